"""Lazy leaves in a shard_map over four CPU devices, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora

# Name -> roles, shape, spec of the kernel, what a shard computes.
CASES = {
  'whole': ('in -> out', (8, 12), P(), lambda x, w: x @ w),
  'outputs': (
    'in -> out',
    (8, 12),
    P(None, 'model'),
    lambda x, w: jax.lax.all_gather(x @ w, 'model', axis=1, tiled=True),
  ),
  'inputs': (
    'in -> out',
    (8, 12),
    P('model'),
    lambda x, w: jax.lax.psum(_mine(x, w.shape[0]) @ w, 'model'),
  ),
  'heads': (
    'in -> heads head_dim',
    (8, 4, 3),
    P(None, 'model'),
    lambda x, w: jax.lax.psum(jnp.einsum('bi,ihd->bhd', x, w).sum(1), 'model'),
  ),
  'torch': (
    'out in: in -> out',
    (12, 8),
    P('model'),
    lambda x, w: jax.lax.all_gather(x @ w.T, 'model', axis=1, tiled=True),
  ),
  'experts': (
    'experts | in -> out',
    (4, 8, 12),
    P('model'),
    lambda x, w: jax.lax.psum(jnp.einsum('bi,eio->ebo', x, w).sum(0), 'model'),
  ),
}


ROOT = pathlib.Path(__file__).parents[2]


def _mine(x, size):
  start = jax.lax.axis_index('model') * size
  return jax.lax.dynamic_slice_in_dim(x, start, size, 1)


def compare(name, kind, check_vma):
  """Raises unless value and gradient equal those through merge."""
  roles, shape, spec, body = CASES[name]
  mesh = jax.make_mesh(
    (2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2
  )
  keys = jax.random.split(jax.random.key(0), 3)
  params = {'w': jax.random.normal(keys[0], shape) / 3}
  fields = {'targets': '.*', 'axes': {'.*': roles}}
  lora = jlora.LoraSpec(
    rank=2, variant='dora' if 'dora' in kind else 'lora', **fields
  )
  quant = jlora.QuantSpec(block_size=4, **fields) if 'nf4' in kind else None
  frozen, trainable = jlora.partition(keys[1], params, lora, quant=quant)
  trainable = jax.tree.map(lambda t: t + 0.3, trainable)
  x = jax.random.normal(keys[2], (4, 8))

  def fn(w, x):
    mapped = jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(P('data'), spec),
      out_specs=P('data'),
      check_vma=check_vma,
    )
    return mapped(x, w)

  def value_and_grad(run, params):
    def loss(trainable, x):
      return jnp.sin(run(params(frozen, trainable, lora)['w'], x)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(trainable, x)

  lifted = jlora.lift(fn, on_missing='error')
  results = [
    value_and_grad(lifted, jlora.combine),
    value_and_grad(fn, jlora.merge),
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
    *results,
  )


def main(kind):
  for name in CASES:
    if name == 'inputs' and 'dora' in kind:
      continue  # a column has its length as a whole: the kernel is formed
    compare(name, kind, check_vma=False)
    if name not in ('outputs', 'torch'):  # JAX cannot see what is gathered
      compare(name, kind, check_vma=True)
    print('same:', name)


@pytest.mark.parametrize('kind', ['lora', 'dora nf4'])
def test_shards_compute_what_merge_does(kind):
  devices = '--xla_force_host_platform_device_count=4'
  ended = subprocess.run(
    [sys.executable, __file__, kind],
    env={**os.environ, 'XLA_FLAGS': devices, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.count('same:') >= 5


if __name__ == '__main__':
  main(sys.argv[1])
