import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core.lora import apply_kernel, densify, is_lazy
from jlora.errors import ConfigError


def make_leaf(stacked=(), dtype=jnp.float32, **fields):
  keys = jax.random.split(jax.random.key(0), 3)
  values = {
    'base': jax.random.normal(keys[0], (*stacked, 8, 2, 3)).astype(dtype),
    'a': jax.random.normal(keys[1], (*stacked, 8, 4)),
    'b': jax.random.normal(keys[2], (*stacked, 4, 6)),
    'scale': jnp.full(stacked, 0.5),
    'key': None,
    'inputs': (8,),
    'outputs': (2, 3),
    'dropout': 0.0,
  }
  return jlora.LoraArray(**(values | fields))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rank': 0}, 'lora.rank is 0'),
    ({'rank': -4}, 'lora.rank is -4'),
    ({'rank': 1.5}, 'lora.rank is 1.5'),
    ({'rank': float('nan')}, 'lora.rank is nan'),
    ({'rank': float('inf')}, 'lora.rank is inf'),
    ({'alpha': 0.0}, 'lora.alpha is 0'),
    ({'alpha': -1.0}, 'lora.alpha is -1'),
    ({'alpha': float('nan')}, 'lora.alpha is nan'),
    ({'alpha': float('inf')}, 'lora.alpha is inf'),
    ({'dropout': 1.0}, 'lora.dropout is 1'),
    ({'dropout': -0.1}, 'lora.dropout is -0.1'),
    ({'dropout': float('nan')}, 'lora.dropout is nan'),
    ({'targets': (3,)}, 'targets holds 3'),
    ({'axes': {'a': 'b'}}, "axis roles 'b'"),
  ],
)
def test_a_spec_refuses_what_cannot_be(fields, message):
  with pytest.raises(ConfigError, match=message):
    jlora.LoraSpec(**fields)


def test_a_whole_rank_may_come_as_a_float():
  rank = jlora.LoraSpec(rank=4.0).rank
  assert (rank, type(rank)) == (4, int)


def test_the_scale_is_alpha_over_rank():
  assert jlora.LoraSpec(rank=8, alpha=12.0).scale == 1.5


def test_specs_with_lists_are_hashable_and_equal():
  one = jlora.LoraSpec(targets=['a'], train_full='b', axes={'a': 'x -> y'})
  two = jlora.LoraSpec(targets='a', train_full=('b',), axes=(('a', 'x -> y'),))
  assert hash(one) == hash(two)
  assert one == two


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
  np.testing.assert_allclose(
    apply_kernel(x, leaf), expected, rtol=1e-5, atol=1e-5
  )


def test_dropout_matches_a_mask_drawn_by_hand():
  key = jax.random.key(4)
  leaf = make_leaf(key=key, dropout=0.25)
  x = jax.random.normal(jax.random.key(9), (40, 8))
  kept = np.asarray(jax.random.bernoulli(key, 0.75, x.shape))
  branch = np.where(kept, np.asarray(x) / 0.75, 0)
  expected = np.asarray(x) @ np.asarray(leaf.base).reshape(8, 6)
  expected += 0.5 * branch @ np.asarray(leaf.a) @ np.asarray(leaf.b)
  assert 0 < kept.mean() < 1
  np.testing.assert_allclose(
    apply_kernel(x, leaf), expected, rtol=1e-5, atol=1e-5
  )


def test_dropout_keeps_the_expectation():
  leaf = make_leaf(dropout=0.5)
  x = jax.random.normal(jax.random.key(9), (3, 8))
  keys = jax.random.split(jax.random.key(1), 4096)

  @jax.vmap
  def draw(key):
    return apply_kernel(x, make_leaf(key=key, dropout=0.5))

  draws = np.asarray(draw(keys))
  error = np.abs(draws.mean(axis=0) - np.asarray(apply_kernel(x, leaf)))
  # 18 means, each within 5 of its standard errors.
  assert (error <= 5 * draws.std(axis=0) / 64 + 1e-5).all()


def test_without_a_key_nothing_is_dropped():
  x = jax.random.normal(jax.random.key(9), (3, 8))
  np.testing.assert_array_equal(
    apply_kernel(x, make_leaf(dropout=0.9)), apply_kernel(x, make_leaf())
  )
