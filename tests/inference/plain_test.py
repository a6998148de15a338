"""Plain arrays are those of merge, and only what is not there yet is formed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core.lazy import is_lazy
from jlora.core.tree import leaves_by_path
from jlora.inference.plain import _form, count_plain, make_plain
from jlora.models import families

QUANT = jlora.QuantSpec(block_size=16)
KINDS = {
  'lora': ({}, None),
  'qlora': ({}, QUANT),
  'dora': ({'variant': 'dora'}, QUANT),
  'rows': ({'train_rows': {'embed/embedding': [1, 5]}}, QUANT),
  'whole': ({'targets': (), 'train_full': '.*scale'}, QUANT),
}


def halves_of(params, spec, quant):
  """Returns both halves, every trained weight away from its start."""
  frozen, trainable = jlora.partition(
    jax.random.key(0), params, spec, quant=quant
  )
  random = np.random.default_rng(0)
  return frozen, jax.tree.map(
    lambda x: x + random.normal(0, 0.1, x.shape).astype('f4'), trainable
  )


@pytest.fixture(scope='module', params=KINDS)
def case(request, config, params):
  """Both halves and their spec."""
  fields, quant = KINDS[request.param]
  spec = families.resolve(jlora.LoraSpec(rank=2, **fields), config)
  quant = quant and families.resolve(quant, config)
  return *halves_of(params, spec, quant), spec


@pytest.fixture(scope='module')
def both(case):
  """The leaves of `combine`, and plain ones, by path."""
  lazy = jlora.combine(*case)
  plain = make_plain(lazy, 'float32')
  return leaves_by_path(lazy, is_lazy), leaves_by_path(plain)


def test_plain_arrays_are_those_of_merge(case, both):
  merged = leaves_by_path(jlora.merge(*case, dtype=jnp.float32))
  # Compiled, a product and a sum may be one operation: an ulp of the sum.
  chex.assert_trees_all_close(both[1], merged, rtol=1e-6, atol=1e-6)


def test_what_is_plain_already_is_not_copied(both):
  lazy, plain = both
  for path, leaf in lazy.items():
    assert (plain[path] is leaf) != is_lazy(leaf)


def test_counted_are_the_bytes_that_are_formed(case, both):
  lazy, plain = both
  formed = sum(plain[p].nbytes for p in lazy if plain[p] is not lazy[p])
  assert count_plain(lazy, 'float32') == formed
  *halves, spec = case
  shapes = jax.eval_shape(lambda *x: jlora.combine(*x, spec), *halves)
  assert count_plain(shapes, 'float32') == formed


def test_kernels_in_another_order_of_axes_are_formed_too():
  kernel = np.random.default_rng(0).normal(size=(6, 3, 32)).astype('f4')
  axes = (('w', 'out layers in: layers | in -> out'),)
  spec = jlora.LoraSpec(rank=2, targets=('w',), axes=axes)
  quant = jlora.QuantSpec(block_size=16, targets=('w',), axes=axes)
  halves = halves_of({'w': kernel}, spec, quant)
  plain = make_plain(jlora.combine(*halves, spec), 'bfloat16')
  merged = jlora.merge(*halves, spec, dtype=jnp.bfloat16)
  assert plain['w'].shape == kernel.shape
  assert plain['w'].dtype == jnp.bfloat16
  # Where sums differ by an ulp, a few are rounded to the neighbor.
  chex.assert_trees_all_close(plain, merged, rtol=2**-7)
  assert np.mean(plain['w'] != merged['w']) < 0.01


def test_scratch_is_that_of_one_layer():
  layers, side = 8, 256
  kernel = np.ones((layers, side, side), 'f4')
  axes = (('w', 'layers | in -> out'),)
  spec = jlora.LoraSpec(rank=2, targets=('w',), axes=axes)
  quant = jlora.QuantSpec(targets=('w',), axes=axes)
  halves = halves_of({'w': kernel}, spec, quant)
  leaf = jlora.combine(*halves, spec)['w']
  form = jax.jit(_form, static_argnums=1)
  memory = form.lower(leaf, jnp.dtype('f4')).compile().memory_analysis()
  assert memory.output_size_in_bytes >= layers * side * side * 4
  assert memory.temp_size_in_bytes < 4 * side * side * 4
