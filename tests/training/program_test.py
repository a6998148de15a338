"""A run's programs are the same for arrays and for shapes alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from jlora.checkpoints.bases import open_base
from jlora.checkpoints.runs import RunCheckpoints
from jlora.config import default_config, default_quant, resolve
from jlora.parallel.mesh import make_mesh
from jlora.training.halves import abstract_halves, load_halves
from jlora.training.program import abstract_batch, make_program
from jlora.training.requirements import resolve as resolve_for


def shapes_of(tree):
  """Leaves as shapes and dtypes, with where they lie."""
  return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding), tree)


@pytest.fixture(scope='module', params=[32, 8], ids=['adam', 'adam_8bit'])
def both(request, tiny_base):
  """A run, its base's sizes, and its halves as arrays and as shapes."""
  config = default_config()
  config.quant = default_quant()
  config.base = str(tiny_base)
  config.train.update(batch_size=2, accumulate=2, steps=3)
  config.data.update(train='unused.jsonl', max_length=16)
  config.optim.moment_bits = request.param
  base = open_base(str(tiny_base))
  spec = resolve_for(resolve(config), base.config)
  mesh = make_mesh(devices=jax.devices()[:1])
  shapes = abstract_halves(spec, base.config, jnp.float32, mesh, 3)
  loaded = load_halves(spec, base, shapes, None)
  return spec, base.config, mesh, loaded, shapes


def test_shapes_are_those_of_the_arrays(both):
  *_, loaded, shapes = both
  assert shapes_of(shapes.frozen) == shapes_of(loaded.frozen)
  assert shapes_of(shapes.state) == shapes_of(loaded.state)


def test_the_same_step_is_compiled(both):
  spec, config, mesh, loaded, shapes = both
  batch = abstract_batch(spec, mesh)
  assert batch.tokens.shape == (2, 16)
  texts = [
    make_program(spec, config, halves, mesh)
    .step.lower(halves.state, halves.frozen, batch)
    .as_text()
    for halves in (loaded, shapes)
  ]
  assert texts[0] == texts[1]


def test_an_adapted_head_is_not_taken_for_a_constant(both):
  spec, config, mesh, *_ = both
  lora = dataclasses.replace(spec.lora, train_full=('embed/embedding',))
  spec = dataclasses.replace(spec, lora=lora)
  halves = abstract_halves(spec, config, jnp.float32, mesh, 3)
  step = make_program(spec, config, halves, mesh).step
  state, _ = jax.eval_shape(
    step, halves.state, halves.frozen, abstract_batch(spec, mesh)
  )
  assert state.trainable['embed']['embedding']['full'].shape == (320, 64)


def test_moments_that_lie_on_the_host_change_nothing(both, tmp_path):
  spec, config, mesh, *_ = both
  base = open_base(spec.base)
  batch = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), abstract_batch(spec, mesh)
  )

  def train(offload):
    optim = dataclasses.replace(spec.optim, offload=offload)
    run = dataclasses.replace(spec, optim=optim)
    halves = abstract_halves(run, config, jnp.float32, mesh, 3)
    halves = load_halves(run, base, halves, None)
    step = make_program(run, config, halves, mesh).step
    state = halves.state
    for _ in range(3):
      state, _ = step(state, halves.frozen, batch)
    return state

  plain, offloaded = train(False), train(True)
  chex.assert_trees_all_equal(plain, offloaded)
  kinds = {
    (x.ndim > 0, x.sharding.memory_kind)
    for x in jax.tree.leaves(offloaded.opt_state)
  }
  assert kinds == {(True, 'pinned_host'), (False, 'device')}
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(offloaded, {})
    restored, _ = checkpoints.restore(offloaded)
  assert shapes_of(restored) == shapes_of(offloaded)
  chex.assert_trees_all_equal(plain, restored)
