"""Facts of jlora.training.adam_8bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.core import formats
from jlora.training import adam_8bit
from jlora.training.adam_8bit import scale_by_adam_8bit

SHAPE = (3, 100, 17)  # 5100 entries: twenty blocks, the last not full


@pytest.fixture(scope='module')
def functional():
  return pytest.importorskip('bitsandbytes').functional


@pytest.mark.parametrize('signed', [True, False])
def test_the_levels_are_those_of_bitsandbytes(functional, signed):
  theirs = functional.create_dynamic_map(signed=signed).numpy()
  np.testing.assert_array_equal(formats.dynamic_map(signed=signed), theirs)


def gradients(count, shape=SHAPE, seed=0):
  """Gradients whose entries keep their size over time, within half a decade.

  So the table through which bitsandbytes finds the nearest level on a CPU, with
  steps of 2^-15, is fine enough for the second moments too.
  """
  random = np.random.default_rng(seed)
  size = 10 ** random.uniform(-0.5, 0, shape)
  for _ in range(count):
    noise = 0.3 * random.standard_normal(shape)
    yield {'a': jnp.asarray(size * (1 + noise), jnp.float32)}


def run(tx, count, shape=SHAPE):
  state, found = tx.init({'a': jnp.zeros(shape)}), []
  for grads in gradients(count, shape):
    updates, state = jax.jit(tx.update)(grads, state)
    found.append(updates['a'])
  return found, state


def test_the_first_update_is_that_of_adam():
  ours, theirs = run(scale_by_adam_8bit(), 1)[0], run(optax.scale_by_adam(), 1)
  np.testing.assert_allclose(ours[0], theirs[0][0], rtol=1e-6)


def test_later_updates_are_near_those_of_adam():
  ours, _ = run(scale_by_adam_8bit(), 20)
  theirs, _ = run(optax.scale_by_adam(), 20)
  for mine, oracle in zip(ours, theirs, strict=True):
    assert np.linalg.norm(mine - oracle) < 0.03 * np.linalg.norm(oracle)


def test_training_is_that_of_bitsandbytes(functional):
  import bitsandbytes
  import torch

  shape = (20 * adam_8bit.BLOCK,)
  parameter = torch.nn.Parameter(torch.zeros(shape))
  optimizer = bitsandbytes.optim.Adam8bit([parameter], lr=1.0)
  for grads in gradients(10, shape):
    parameter.grad = torch.tensor(np.asarray(grads['a']))
    optimizer.step()
  theirs = optimizer.state[parameter]
  updates, state = run(scale_by_adam_8bit(), 10, shape)
  found, expected = -sum(updates), parameter.detach().numpy()
  # Codes of values near a midpoint differ, and their moments by a level.
  assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
  for codes, name in ((state.mu, 'state1'), (state.nu, 'state2')):
    assert np.mean(np.asarray(codes['a']) == theirs[name].numpy()) > 0.98


def test_moments_are_within_half_a_level_of_those_they_stand_for():
  _, state = run(scale_by_adam_8bit(), 1)
  (grads,) = gradients(1)
  squares = 1e-3 * grads['a'] ** 2
  for codes, scales, levels, exact in (
    (state.mu, state.mu_scales, formats.DYNAMIC, 0.1 * grads['a']),
    (state.nu, state.nu_scales, formats.DYNAMIC_UNSIGNED, squares),
  ):
    absmax = np.repeat(scales['a'], 256)[: exact.size].reshape(SHAPE)
    found = levels[np.asarray(codes['a'])] * absmax
    index = np.clip(np.asarray(codes['a']), 1, 254).astype(int)
    gap = (levels[index + 1] - levels[index - 1]) * absmax
    assert (np.abs(found - exact) <= gap / 2 + 1e-7 * absmax).all()


def test_a_weight_takes_two_bytes_and_its_share_of_two_scales():
  state = jax.eval_shape(scale_by_adam_8bit().init, {'a': jnp.zeros((64, 256))})
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert size == 64 * 256 * 2 + 64 * 2 * 4 + 4


def test_a_small_leaf_has_the_moments_of_adam():
  shape = (adam_8bit.SMALLEST - 1,)
  ours, theirs = (
    run(tx, 3, shape) for tx in (scale_by_adam_8bit(), optax.scale_by_adam())
  )
  for mine, oracle in zip(ours[0], theirs[0], strict=True):
    np.testing.assert_allclose(mine, oracle, rtol=1e-6)
  assert ours[1].mu['a'].dtype == jnp.float32


def test_zero_gradients_move_nothing():
  tx = scale_by_adam_8bit()
  zeros = {'a': jnp.zeros(SHAPE)}
  updates, state = tx.update(zeros, tx.init(zeros))
  assert not np.any(updates['a'])
  assert not np.any(state.mu_scales['a'])
