"""How much of each source an epoch holds, and which examples those are."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.errors import ConfigError, DataError

# Pairs of a source and its weight; None takes all of it in every epoch.
Sources = Sequence[tuple[str, float | None]]

_MIXING = 1 << 63  # keys of Philox that no epoch has


def make_sources(value: Any) -> str | tuple[tuple[str, float | None], ...]:
  """Returns what a config gives as training data.

  Args:
    value: The name of a source, several of them, a mapping from names to
      weights, or pairs of both.

  Raises:
    ConfigError: It is something else, a weight is not above 0, or a source is
      named twice.
  """
  if isinstance(value, str):
    return value
  entries = value.items() if isinstance(value, dict) else value
  try:
    pairs = [(e, None) if isinstance(e, str) else tuple(e) for e in entries]
    sources = tuple((name, weight) for name, weight in pairs)
  except (TypeError, ValueError):
    sources = ()
  names = [name for name, _ in sources]
  if not sources or not all(isinstance(name, str) and name for name in names):
    raise ConfigError(
      f'data.train is {value!r}; it takes a source, a list of sources, or a'
      " dict of weights such as {'a.jsonl': 3, 'b.jsonl': 1}"
    )
  if len(set(names)) < len(names):
    raise ConfigError(f'data.train names a source twice: {names}')
  _check_weights([weight for _, weight in sources])
  return sources


def _check_weights(weights: list[Any]) -> None:
  if all(weight is None for weight in weights):
    return
  for weight in weights:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
      raise ConfigError(
        f'data.train has the weight {weight!r}; each is a number above 0'
      )


def shares(sources: Sources) -> list[float]:
  """Returns each source's share of the examples, by its weight.

  Args:
    sources: Names and weights; where there are none, all count alike.
  """
  weights = [1.0 if weight is None else weight for _, weight in sources]
  return [weight / sum(weights) for weight in weights]


def portion(examples: int | None, share: float) -> Any:
  """Returns a share of a number of examples, at least one.

  Args:
    examples: How many; None is all, and stays so.
    share: Of them.
  """
  return examples if examples is None else max(round(examples * share), 1)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Examples of several sources, one source after the other.

  With weights, an epoch holds as many examples as keep to them without going
  round a source: it ends where the first source does. The next epoch goes on
  in the others where this one ended, and begins anew, in another order, those
  that it comes to the end of.

  Attributes:
    sizes: Examples of each source.
    weights: Of each; None takes all in every epoch.
  """

  sizes: tuple[int, ...]
  weights: tuple[float | None, ...]

  @property
  def counts(self) -> tuple[int, ...]:
    """Examples of each source in an epoch."""
    if None in self.weights:
      return self.sizes
    pairs = list(zip(self.sizes, self.weights, strict=True))
    unit = min(size / weight for size, weight in pairs)
    # A hair more, or 30 examples at 0.1 of 300 would be 29.
    return tuple(
      min(size, int(unit * weight * (1 + 1e-9))) for size, weight in pairs
    )

  def require_all(self, names: Sequence[str]) -> None:
    """Requires that an epoch holds an example of every source.

    Args:
      names: Of the sources.

    Raises:
      DataError: It does not.
    """
    for name, count, size in zip(names, self.counts, self.sizes, strict=True):
      if not count:
        raise DataError(
          f'with the weights of data.train, an epoch would hold none of the'
          f' {size:,} examples of {name!r}; raise its weight, or give more data'
          ' of the others'
        )

  def draw(self, seed: int, epoch: int) -> np.ndarray:
    """Returns which examples an epoch holds, ascending.

    Args:
      seed: Of the run.
      epoch: Counts from zero.
    """
    starts = np.cumsum([0, *self.sizes])
    return np.concatenate(
      [
        start + self._drawn(seed, part, epoch)
        for part, start in enumerate(starts[:-1])
      ]
    )

  def _drawn(self, seed: int, part: int, epoch: int) -> np.ndarray:
    """Returns those of one source, which goes round in new permutations."""
    size, count = self.sizes[part], self.counts[part]
    if count == size:
      return np.arange(size)
    first, last = epoch * count, (epoch + 1) * count
    rounds = range(first // size, -(-last // size))
    around = np.concatenate([_permuted(seed, part, r, size) for r in rounds])
    start = first - rounds[0] * size
    return np.sort(around[start : start + count])


def _permuted(seed: int, part: int, turn: int, size: int) -> np.ndarray:
  key = np.array([seed, _MIXING + (part << 40) + turn], np.uint64)
  return np.argsort(np.random.Philox(key=key).random_raw(size), kind='stable')
