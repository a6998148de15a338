"""The arms in JAX compute the same, and what a step is said to need."""

import jax
import numpy as np
import pytest

import jlora
from experiments.benchmarks.arms import ours
from experiments.benchmarks.bare import linear, model, weights
from experiments.benchmarks.harness import models, sizes, training
from jlora.checkpoints.bases import open_base
from jlora.parallel.mesh import make_mesh
from jlora.training.halves import abstract_halves, load_halves
from jlora.training.program import make_program
from jlora.training.requirements import resolve

QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
SIZES = {
  'layers': 2,
  'embed': 64,
  'mlp': 128,
  'heads': 4,
  'kv_heads': 2,
  'head_dim': 16,
  'vocab': 96,
}


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model') / 'random'
  config = models.Model(None, models.make_config(SIZES)).write(folder)
  training.write_tokens(folder, config.vocab_size)
  return training.Work(
    method='lora',
    remat='full',
    batch=2,
    length=128,
    rank=4,
    alpha=8.0,
    steps=1,
    folder=str(folder),
  )


@pytest.fixture(scope='module')
def updated(work):
  """Losses and adapters after two steps of ours, and of the one by hand."""
  base, mesh = open_base(work.folder), make_mesh(1, devices=jax.devices()[:1])
  spec = resolve(ours.make_spec(work), base.config)
  shapes = abstract_halves(spec, base.config, np.float32, mesh, 2)
  halves = load_halves(spec, base, shapes, None)
  frozen, mine = weights.read_frozen(work.path, packed=False), halves.state
  theirs = jax.tree.map(np.array, by_name(mine.trainable))
  state, batches = model.start(theirs), work.batches()
  step = quick(
    make_program(spec, base.config, shapes, mesh).step,
    (mine, halves.frozen, ours.make_batch(batches[0])),
  )
  sizes = weights.read_sizes(work.path, 2.0, work.remat)
  by_hand = quick(
    model.make_step(sizes, training.LEARNING_RATE),
    (theirs, state, frozen, batches[0]),
  )
  found = []
  for batch in batches:
    mine, metrics = step(mine, halves.frozen, ours.make_batch(batch))
    theirs, state, loss = by_hand(theirs, state, frozen, batch)
    found.append((metrics['loss'], loss))
  return found, by_name(mine.trainable), theirs


def quick(step, args):
  """Compiles a step without XLA's optimizations."""
  return step.lower(*args).compile(compiler_options=QUICK)


def by_name(trainable):
  """Returns our adapters in the tree of the step by hand."""
  layers = trainable['layers']
  found = {}
  for name in model.KERNELS:
    room = 'attention' if name in 'qkvo' else 'mlp'
    adapter = layers[room][f'{name}_proj']['kernel']
    found[name] = (adapter['a'], adapter['b'])
  return found


def test_ours_and_the_step_by_hand_have_the_same_losses(updated):
  losses = np.array(updated[0])
  assert losses[0, 0] != losses[1, 0]
  np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)


def test_ours_and_the_step_by_hand_make_the_same_updates(updated):
  _, mine, theirs = updated
  # Adam divides by a gradient's size: what is small differs by rounding.
  for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
    assert np.any(y)
    np.testing.assert_allclose(x, y, atol=0.02 * training.LEARNING_RATE)


def test_adapters_start_as_ours_do(work):
  frozen = weights.read_frozen(work.path, packed=True)
  adapters = weights.make_adapters(frozen, work.rank)
  a, b = adapters['down']
  assert a.shape == (2, 128, 4)
  assert b.shape == (2, 4, 64)
  assert not np.any(b)
  assert 0.9 * 128**-0.5 < np.abs(a).max() <= 128**-0.5


def test_codes_by_hand_stand_for_the_kernel_that_ours_do():
  kernel = np.random.default_rng(0).normal(size=(128, 6)).astype('f4')
  kernel[:64, 1] = 0
  spec = jlora.QuantSpec(double_quant=False)
  quantized = jlora.quantize({'a': {'kernel': kernel}}, spec)
  wanted = jlora.dequantize(quantized)['a']['kernel']
  np.testing.assert_array_equal(linear.unpack(linear.pack(kernel)), wanted)


def test_kernels_that_do_not_fit_blocks_are_refused():
  with pytest.raises(ValueError, match=r'100 rows.*multiple of 64'):
    linear.pack(np.ones((100, 2), 'f4'))


@pytest.mark.parametrize('method', ['lora', 'qlora'])
def test_a_step_needs_the_products_that_the_one_by_hand_computes(work, method):
  config = open_base(work.folder).config
  frozen = weights.read_frozen(work.path, packed=method == 'qlora')
  adapters = weights.make_adapters(frozen, work.rank)
  step = model.make_step(weights.read_sizes(work.path, 2.0, 'none'), 1e-3)
  args = (adapters, model.start(adapters), frozen, work.batches()[0])
  counted = training.count_flops(step, *args)['flops']
  assert counted == sizes.model_flops(config, work.batch, work.length, 4)


def test_batches_of_random_tokens_differ_and_repeat(work):
  first, second = work.batches()
  assert not np.array_equal(first['tokens'], second['tokens'])
  np.testing.assert_array_equal(first['tokens'], work.batches()[0]['tokens'])
  np.testing.assert_array_equal(
    first['targets'][:, :-1], first['tokens'][:, 1:]
  )
  assert first['loss_mask'].sum() == 2 * 127
  assert training.places(first) == 2 * 128
