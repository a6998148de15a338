"""Scales at another rank, and the way back."""

import math

import numpy as np
import pytest

from jlora.checkpoints.peft_scales import (
  alpha_at,
  alpha_within,
  divided,
  times,
)

ALPHAS = (1, 7.1, 16, 1 / 3, 10 * math.sqrt(2), 1e-6, 12345.678)
RANKS = ((4, 8), (3, 7), (8, 12), (1, 64))


@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
@pytest.mark.parametrize(('rank', 'wide'), RANKS)
def test_an_alpha_comes_back(scaling, rank, wide):
  for alpha in ALPHAS:
    wider = alpha_at((rank, alpha), wide, scaling)
    power = 0.5 if scaling == 'rslora' else 1
    np.testing.assert_allclose(
      wider / wide**power, alpha / rank**power, rtol=1e-14
    )
    again = alpha_within((wide, wider), rank, scaling)
    np.testing.assert_allclose(again, alpha, rtol=1e-12)
    assert alpha_at((rank, again), wide, scaling) == wider


def test_a_short_alpha_comes_back_as_it_was():
  for rank, wide in RANKS:
    for alpha in (16, 7.1, 0.125, 1000):
      wider = alpha_at((rank, alpha), wide, 'rslora')
      assert alpha_within((wide, wider), rank, 'rslora') == alpha


def test_the_same_rank_changes_nothing():
  alpha = math.sqrt(2) / 3
  assert alpha_at((4, alpha), 4, 'rslora') == alpha
  assert alpha_within((4, alpha), 4, 'rslora') == alpha


@pytest.mark.parametrize('factor', [1.0, 0.7, 1 / 3, 3.7, 2.0, math.pi])
def test_a_product_divided_gives_the_same_product(factor):
  array = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
  product = times(array, factor)
  found = divided(product, factor)
  np.testing.assert_array_equal(times(found, factor), product)
  np.testing.assert_allclose(found, array, rtol=2**-23)
