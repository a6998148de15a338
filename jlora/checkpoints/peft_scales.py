"""Scales of low-rank pairs that become part of a wider one, and back.

The scale is alpha / rank, or alpha / sqrt(rank). Both ways give the same
numbers again: alphas are cut to 15 digits at the wider rank, and to 13 at their
own where that makes no difference; products with a factor are undone to the
value that gives the same product.
"""

import math

import numpy as np

Strength = tuple[int, float]  # rank and alpha


def alpha_at(pair: Strength, rank: int, scaling: str) -> float:
  """Returns the alpha that gives a pair's scale at a larger rank.

  Args:
    pair: Rank and alpha.
    rank: The larger rank.
    scaling: As in LoraSpec.
  """
  own, alpha = pair
  if own == rank:
    return alpha
  return float(f'{alpha * _growth(own, rank, scaling):.15g}')


def alpha_within(pair: Strength, rank: int, scaling: str) -> float:
  """Returns the alpha of which `alpha_at` makes that of a wider pair.

  Args:
    pair: Rank and alpha of the wider one.
    rank: The smaller rank.
    scaling: As in LoraSpec.
  """
  wide, alpha = pair
  exact = alpha / _growth(rank, wide, scaling)
  short = float(f'{exact:.13g}')
  return short if alpha_at((rank, short), wide, scaling) == alpha else exact


def _growth(rank: int, wide: int, scaling: str) -> float:
  return math.sqrt(wide / rank) if scaling == 'rslora' else wide / rank


def times(array: np.ndarray, factor: float) -> np.ndarray:
  """Returns a float32 array times a factor, rounded once."""
  if factor == 1:
    return array
  return (array.astype(np.float64) * factor).astype(np.float32)


def divided(array: np.ndarray, factor: float) -> np.ndarray:
  """Returns an array that `times` turns into the one given.

  Args:
    array: From `times`.
    factor: The one that it had.
  """
  if factor == 1:
    return array
  near = (array.astype(np.float64) / factor).astype(np.float32)
  for way in (-np.inf, np.inf):
    other = np.nextafter(near, np.float32(way))
    fits = times(near, factor) == array
    near = np.where(~fits & (times(other, factor) == array), other, near)
  return near
