"""Answers from merged weights are those of lazy ones."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints.bases import open_base
from jlora.config import default_config, default_quant, resolve
from jlora.core.lazy import is_lazy
from jlora.core.lift import lift
from jlora.inference.plain import count_plain
from jlora.models.decoder import Decoder
from jlora.parallel.mesh import make_mesh
from jlora.training import evaluation
from jlora.training.halves import abstract_halves, count_merged, load_halves
from jlora.training.requirements import resolve as resolve_for


@pytest.fixture(scope='module', params=['lora', 'qlora'])
def job(request, tiny_base):
  """What `complete` reads of a job, and adapters that are not zero."""
  config = default_config()
  config.base = str(tiny_base)
  config.quant = default_quant() if request.param == 'qlora' else None
  config.data.train = 'unused.jsonl'
  config.train.steps = 1
  config.eval.max_new_tokens = 12
  config.eval.batch_size = 3
  base = open_base(config.base)
  spec = resolve_for(resolve(config), base.config)
  mesh = make_mesh(devices=jax.devices()[:1])
  shapes = abstract_halves(spec, base.config, jnp.float32, mesh, 1)
  halves = load_halves(spec, base, shapes, None)
  random = np.random.default_rng(0)
  return types.SimpleNamespace(
    spec=spec,
    base=base,
    frozen=halves.frozen,
    trainable=jax.tree.map(
      lambda x: x + random.normal(0, 0.1, x.shape).astype('f4'),
      halves.state.trainable,
    ),
    shardings=halves.shardings,
    shapes=shapes,
    apply=lift(Decoder(base.config).apply, gather=halves.shardings.gather),
    dtype=jnp.float32,
  )


@pytest.fixture
def answers(job, monkeypatch):
  """Answers with `eval.merge` or without, and the parameters they came from."""
  used = []
  generate = evaluation.generate

  def spy(apply, params, *args, **options):
    used.append(params)
    return generate(apply, params, *args, **options)

  monkeypatch.setattr(evaluation, 'generate', spy)
  prompts = [np.arange(3, 9), np.arange(40, 45), np.arange(7, 20)]

  def run(merge, trainable=job.trainable):
    rules = dataclasses.replace(job.spec.eval, merge=merge)
    job.spec = dataclasses.replace(job.spec, eval=rules)
    return evaluation.complete(job, trainable, prompts), used[-1]

  return run


def test_answers_from_merged_weights_are_those_of_lazy_ones(job, answers):
  lazy, decoded = answers(merge=False)
  merged, formed = answers(merge=True)
  assert merged == lazy
  assert len(set(merged)) == 3
  assert any(map(is_lazy, jax.tree.leaves(decoded, is_leaf=is_lazy)))
  assert not any(map(is_lazy, jax.tree.leaves(formed, is_leaf=is_lazy)))
  zero = jax.tree.map(jnp.zeros_like, job.trainable)
  assert answers(merge=True, trainable=zero)[0] != merged


def test_what_merging_takes_is_known_from_shapes(job, answers):
  _, lazy = answers(merge=False)
  size = count_merged(job.spec, job.shapes)
  assert size == count_plain(lazy, job.dtype) > 0
  kernels = job.base.config.layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
  assert size == 4 * kernels
