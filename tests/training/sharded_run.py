"""Trains one decoder on meshes of eight CPU devices; run by sharded_test.py.

Prints a line of JSON: by mesh, the largest distances of losses, of the first
gradient and of adapters to one device's, and the collectives compiled.
"""

import dataclasses
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora.core import tree
from jlora.core.plan import is_frozen_leaf
from jlora.data.batch import Batch
from jlora.inference.plain import count_plain, make_plain
from jlora.inference.sampler import generate
from jlora.inference.sampling import Sampling
from jlora.models import families, layout
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.parallel.mesh import make_mesh
from jlora.parallel.shardings import make_shardings
from jlora.training.step import make_loss, make_step

SMOLLM2 = DecoderConfig(
  vocab_size=49152,
  embed_dim=576,
  mlp_dim=1536,
  layers=2,
  heads=9,
  kv_heads=3,
  head_dim=64,
)
# Nothing but the batch divides by two, and inputs are no multiple of a block.
ODD = DecoderConfig(
  vocab_size=163,
  embed_dim=75,
  mlp_dim=91,
  layers=3,
  heads=5,
  kv_heads=1,
  head_dim=14,
  tie_embeddings=False,
)
# All sizes divide, so every mesh axis cuts every kernel as its rule says.
EVEN = dataclasses.replace(
  ODD, vocab_size=160, embed_dim=128, mlp_dim=256, heads=8, kv_heads=4,
  head_dim=16,
)  # fmt: skip
CONFIGS = {'smollm2': SMOLLM2, 'odd': ODD, 'even': EVEN}
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2))
STEPS = {'adam': 10, 'sgd': 3}
# Small programs take longer to optimize than to run.
QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
COLLECTIVE = re.compile(r'= (.*) (?:all-gather|all-to-all)(?:-start)?\(')
ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


def either(adam, sgd):
  """An optimizer that is one of two, as a flag in its state says.

  It keeps the last gradient too, so that one program tests all three.
  """

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jnp.bool_(True), adam.init(params), sgd.init(params), zeros

  def update(grads, state, params):
    flag, of_adam, of_sgd, _ = state
    first, of_adam = adam.update(grads, of_adam, params)
    second, of_sgd = sgd.update(grads, of_sgd, params)
    updates = jax.tree.map(lambda x, y: jnp.where(flag, x, y), first, second)
    return updates, (flag, of_adam, of_sgd, grads)

  return optax.GradientTransformation(init, update)


def make_batch(vocab, rows, length):
  random = np.random.default_rng(0)
  tokens = random.integers(0, vocab, (rows, length + 1)).astype(np.int32)
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  mask = positions < 1 + np.arange(rows)[:, None] * (length - 1) // (rows - 1)
  return Batch(
    tokens=tokens[:, :-1],
    targets=tokens[:, 1:],
    loss_mask=mask.astype(np.float32),
    segment_ids=np.ones_like(positions),
    positions=positions,
  )


def train(config, halves, spec, axes) -> dict[str, Any]:
  """Returns what training on a mesh gives, as numpy arrays."""
  frozen, trainable = halves
  mesh = make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
  leaves = tree.arrays_by_path(frozen, is_frozen_leaf)
  shardings = make_shardings(leaves, families.SHARDING, mesh)
  loss_fn = make_loss(
    Decoder(config, remat='full'),
    spec,
    chunk=48,
    frozen_head=True,
    gather=shardings.gather,
  )
  # An eps above the noise of a sum: else Adam makes that noise whole updates.
  tx = either(optax.adamw(1e-3, eps=1e-4), optax.sgd(0.03))
  first = jlora.TrainState(jnp.int32(0), trainable, tx.init(trainable))
  placed = shardings.state(first), shardings.frozen(frozen)
  frozen = jax.device_put(frozen, placed[1])
  # The large one has few tokens, the others several chunks, the last padded.
  rows, length = (8, 4) if config == SMOLLM2 else (16, 11)
  batch = make_batch(config.vocab_size, rows, length)
  accumulate = 2 if config == ODD else 1
  step = make_step(loss_fn, tx, mesh, accumulate=accumulate, placed=placed)
  options = {} if config == SMOLLM2 else QUICK
  step = step.lower(first, frozen, batch).compile(compiler_options=options)
  found = {'text': step.as_text(), 'flops': step.cost_analysis()['flops']}
  for name, steps in STEPS.items():
    opt_state = (jnp.bool_(name == 'adam'), *first.opt_state[1:])
    state = dataclasses.replace(first, opt_state=opt_state)
    state = jax.device_put(jax.tree.map(jnp.copy, state), placed[0])
    losses = []
    for count in range(steps):
      state, metrics = step(state, frozen, batch)
      losses.append(float(metrics['loss']))
      if count == 0:
        found['gradient'] = jax.tree.map(np.asarray, state.opt_state[-1])
    found[name] = losses
    found[f'{name} adapters'] = jax.tree.map(np.asarray, state.trainable)
  return found


def answer(config, halves, spec, axes) -> dict[str, Any]:
  """Returns what merged weights are on a mesh, and what they answer."""
  mesh = make_mesh(*axes, devices=jax.devices()[: np.prod(axes)])
  leaves = tree.arrays_by_path(halves[0], is_frozen_leaf)
  shardings = make_shardings(leaves, families.SHARDING, mesh)
  placed = shardings.frozen(halves[0]), shardings.trainable(halves[1])
  lazy = jlora.combine(*jax.device_put(halves, placed), spec)
  params = make_plain(lazy, jnp.float32, shardings.of_plain)
  tokens = generate(
    jlora.lift(Decoder(config).apply, gather=shardings.gather),
    params,
    config,
    [np.arange(3, 9)],
    Sampling(max_new_tokens=8),
    eos_token_ids=(),
    batch_size=1,
    dtype=jnp.float32,
  )
  return {
    'kernels': jax.tree.map(np.asarray, params),
    'bytes': count_plain(lazy, jnp.float32, shardings.of_plain),
    'lies': sum(
      x.addressable_shards[0].data.nbytes
      for x in jax.tree.leaves(params['layers'])
      if x.ndim == 3
    ),
    'tokens': tokens[0].tolist(),
  }


def compare_answers(config, halves, spec) -> dict[str, Any]:
  """Returns how merged weights on eight devices differ from those on one."""
  one, many = (
    answer(config, halves, spec, axes) for axes in ((1, 1, 1), (2, 2, 2))
  )
  return {
    'distance': distance(many['kernels'], one['kernels']),
    'share': many['bytes'] / one['bytes'],
    'counted': many['bytes'] == many['lies'],
    'tokens': [one['tokens'], many['tokens']],
  }


def distance(ours, oracle):
  """Returns the largest relative distance of any leaf."""
  return max(
    float(np.linalg.norm(x - y) / np.linalg.norm(y))
    for x, y in zip(*map(jax.tree.leaves, (ours, oracle)), strict=True)
  )


def gathered(text):
  """Returns dtype and shape of what devices bring together, as compiled."""
  return [
    (dtype, [int(n) for n in shape.split(',') if n])
    for results in COLLECTIVE.findall(text)
    for dtype, shape in ARRAY.findall(results)
  ]


def started(trainable):
  """Returns adapters that are not zero: each entry 0.01 of noise away.

  Small and random, or else rounding grows tenfold a step: with 0.01 on every
  entry, 1e-7 of the adapters became 0.8 of the loss in ten steps on one device.
  """
  random = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: x + random.normal(0, 0.01, x.shape).astype('f4'), trainable
  )


def make_params(config):
  random = np.random.default_rng(1)
  return tree.nest(
    {
      path: np.ones(leaf.shape, 'f4')
      if path.endswith('scale')
      else random.normal(0, leaf.shape[-2] ** -0.5, leaf.shape).astype('f4')
      for path, leaf in layout.shapes(config).items()
    }
  )


def main(name: str, quantized: str) -> None:
  config = CONFIGS[name]
  spec = families.resolve(jlora.LoraSpec(rank=5), config)
  quant = None
  if quantized == 'nf4':
    quant = jlora.QuantSpec(block_size=64 if name == 'smollm2' else 16)
    quant = families.resolve(quant, config)
  key, params = jax.random.key(1), make_params(config)
  split = jlora.partition(key, params, spec, quant=quant)
  halves = split[0], started(split[1])
  runs = {axes: train(config, halves, spec, axes) for axes in MESHES}
  one = runs[MESHES[0]]
  report = {
    ','.join(map(str, axes)): {
      'losses': [
        max(np.abs(np.divide(run[k], one[k]) - 1)) for k in ('adam', 'sgd')
      ],
      'gradient': distance(run['gradient'], one['gradient']),
      'adapters': distance(run['sgd adapters'], one['sgd adapters']),
      'gathered': gathered(run['text']),
      'flops': run['flops'] / one['flops'],
      'falls': run['adam'][-1] < run['adam'][0],
    }
    for axes, run in runs.items()
  }
  if (name, quantized) == ('even', 'nf4'):
    report['merged'] = compare_answers(config, halves, spec)
  print(json.dumps(report))


if __name__ == '__main__':
  main(*sys.argv[1:])
