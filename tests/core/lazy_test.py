import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core.lazy import RowsArray, densify, is_lazy
from jlora.core.products import multiply


def make_leaf(stacked=(), dtype=jnp.float32, **fields):
  keys = jax.random.split(jax.random.key(0), 3)
  values = {
    'base': jax.random.normal(keys[0], (*stacked, 8, 2, 3)).astype(dtype),
    'a': jax.random.normal(keys[1], (*stacked, 8, 4)),
    'b': jax.random.normal(keys[2], (*stacked, 4, 6)),
    'scale': jnp.full(stacked, 0.5),
    'magnitude': None,
    'key': None,
    'inputs': (8,),
    'outputs': (2, 3),
    'order': (),
    'dtype': jnp.dtype(dtype),
    'dropout': 0.0,
  }
  return jlora.LoraArray(**(values | fields))


def test_a_leaf_has_the_shape_of_its_kernel():
  leaf = make_leaf((5,))
  assert (leaf.shape, leaf.ndim) == ((5, 8, 2, 3), 4)
  assert (leaf.stacked, leaf.dtype) == ((5,), jnp.float32)
  assert leaf.astype(jnp.bfloat16).dtype == jnp.bfloat16
  assert leaf.astype(jnp.bfloat16).a.dtype == jnp.float32


def test_densify_adds_the_scaled_product():
  leaf = make_leaf((5,))
  update = 0.5 * np.einsum('lir,lro->lio', leaf.a, leaf.b)
  expected = np.asarray(leaf.base) + update.reshape(5, 8, 2, 3)
  np.testing.assert_allclose(densify(leaf), expected, rtol=1e-5, atol=1e-6)


def test_densify_rounds_the_sum_once():
  leaf = make_leaf(dtype=jnp.bfloat16)
  exact = densify(leaf, jnp.float32)
  np.testing.assert_array_equal(densify(leaf), exact.astype(jnp.bfloat16))


def test_densify_leaves_arrays_alone():
  x = jnp.ones(3)
  assert densify(x) is x
  assert densify(x, jnp.bfloat16).dtype == jnp.bfloat16
  assert not is_lazy(x)


def test_applying_a_leaf_is_applying_its_dense_kernel():
  leaf = make_leaf()
  x = jax.random.normal(jax.random.key(9), (7, 8))
  expected = x @ densify(leaf).reshape(8, 6)
  np.testing.assert_allclose(multiply(x, leaf), expected, rtol=1e-5, atol=1e-5)


def test_dropout_matches_a_mask_drawn_by_hand():
  key = jax.random.key(4)
  leaf = make_leaf(key=key, dropout=0.25)
  x = jax.random.normal(jax.random.key(9), (40, 8))
  kept = np.asarray(jax.random.bernoulli(key, 0.75, x.shape))
  branch = np.where(kept, np.asarray(x) / 0.75, 0)
  expected = np.asarray(x) @ np.asarray(leaf.base).reshape(8, 6)
  expected += 0.5 * branch @ np.asarray(leaf.a) @ np.asarray(leaf.b)
  assert 0 < kept.mean() < 1
  np.testing.assert_allclose(multiply(x, leaf), expected, rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_expectation():
  leaf = make_leaf(dropout=0.5)
  x = jax.random.normal(jax.random.key(9), (3, 8))
  keys = jax.random.split(jax.random.key(1), 4096)

  @jax.vmap
  def draw(key):
    return multiply(x, make_leaf(key=key, dropout=0.5))

  draws = np.asarray(draw(keys))
  error = np.abs(draws.mean(axis=0) - np.asarray(multiply(x, leaf)))
  # 18 means, each within 5 of its standard errors.
  assert (error <= 5 * draws.std(axis=0) / 64 + 1e-5).all()


def test_without_a_key_nothing_is_dropped():
  x = jax.random.normal(jax.random.key(9), (3, 8))
  np.testing.assert_array_equal(
    multiply(x, make_leaf(dropout=0.9)), multiply(x, make_leaf())
  )


def test_a_magnitude_is_the_length_of_each_column():
  magnitude = jnp.arange(1.0, 7.0)
  kernel = densify(make_leaf(magnitude=magnitude)).reshape(8, 6)
  np.testing.assert_allclose(
    np.linalg.norm(kernel, axis=0), magnitude, rtol=1e-5
  )


def test_a_layer_with_scale_zero_ignores_its_magnitude():
  scale = jnp.array([0.5, 0.0])
  leaf = make_leaf((2,), scale=scale, magnitude=jnp.ones((2, 6)))
  np.testing.assert_array_equal(densify(leaf)[1], leaf.base[1])
  assert not np.allclose(densify(leaf)[0], leaf.base[0])


@pytest.mark.parametrize(('axis', 'expected'), [('in', 0), ('out', 1)])
def test_rows_take_the_place_of_those_of_the_table(axis, expected):
  base = jax.random.normal(jax.random.key(0), (6, 6))
  leaf = RowsArray(
    base, jnp.ones((2, 6)), (1, 4), axis, (6,), (6,), (), base.dtype
  )
  changed = np.any(densify(leaf) != base, axis=1 - expected)
  np.testing.assert_array_equal(np.flatnonzero(changed), [1, 4])


def lazy_leaves():
  spec = jlora.LoraSpec(rank=2, train_rows={'embedding': [1]})
  params = {'kernel': jnp.ones((8, 8)), 'embedding': jnp.ones((8, 8))}
  frozen, trainable = jlora.partition(jax.random.key(0), params, spec)
  combined = jlora.combine(frozen, trainable, spec)
  return [
    *combined.values(),
    jlora.quantize(params, jlora.QuantSpec())['kernel'],
  ]


@pytest.mark.parametrize('leaf', lazy_leaves(), ids=lambda x: type(x).__name__)
def test_plain_code_on_a_lazy_leaf_says_to_lift_it(leaf):
  for use in (lambda w: jnp.ones((2, 8)) @ w, jnp.sin, jnp.asarray):
    with pytest.raises(TypeError, match=r'call that code through jlora\.lift'):
      use(leaf)
