"""Which leaves are trained, how strongly, and how their adapters start."""

import dataclasses
import math
from typing import Any

import numpy as np

from jlora.core import targets, tree
from jlora.core.axes import Axes
from jlora.core.targets import Target
from jlora.errors import ConfigError

SCALINGS = ('lora', 'rslora')
VARIANTS = ('lora', 'dora')
INITS = ('lora', 'gaussian', 'pissa', 'olora', 'loftq')
INITS_THAT_CHANGE_THE_BASE = ('pissa', 'olora', 'loftq')

Pairs = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
  """Which leaves are trained, and how.

  The update of a kernel is `s * a @ b`, with `s` the scale.

  Attributes:
    rank: Inner size of the adapters.
    alpha: Strength of the adapters.
    targets: Kernels with an adapter: 'all-linear', or patterns over whole leaf
      paths. A pattern over the path of one layer of a stacked leaf, such as
      `layers/3/up/kernel`, chooses that layer.
    exclude: Patterns that take kernels, or layers of them, out again.
    axes: Roles of kernels' axes, see `jlora.core.axes`.
    rank_pattern: Ranks of single kernels or layers, by pattern; the first
      match wins. Within a stack, smaller ranks are padded with zeros.
    alpha_pattern: Likewise for alpha.
    scaling: 'lora', s = alpha / rank, or 'rslora', s = alpha / sqrt(rank).
    variant: 'lora', or 'dora', which trains each output's magnitude too.
    init: How adapters start: 'lora' and 'gaussian' leave the base as it is;
      'pissa', 'olora' and 'loftq' take the start of the adapter out of it.
    dropout: Share of the adapters' inputs that is dropped in training.
    train_full: Patterns of leaves that are trained whole, such as norms.
    train_rows: Row ids, by pattern, of embeddings of which only these rows
      are trained, such as those of new tokens.

  References:
    Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_;
    Kalajdzievski, `rsLoRA <https://arxiv.org/abs/2312.03732>`_;
    Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_;
    for the inits see `jlora.core.initializers`.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: str | tuple[str, ...] = targets.ALL_LINEAR
  exclude: tuple[str, ...] = ()
  axes: Axes = ()
  rank_pattern: Pairs = ()
  alpha_pattern: Pairs = ()
  scaling: str = 'lora'
  variant: str = 'lora'
  init: str = 'lora'
  dropout: float = 0.0
  train_full: tuple[str, ...] = ()
  train_rows: Pairs = ()

  def __post_init__(self) -> None:
    """Checks the fields and turns lists and dicts into tuples."""
    targets.normalize_patterns(self, 'targets', 'exclude', 'train_full')
    self._set('rank', _rank('lora.rank', self.rank))
    self._set('alpha', _alpha('lora.alpha', self.alpha))
    for field, check in (('rank_pattern', _rank), ('alpha_pattern', _alpha)):
      pairs = targets.as_pairs(getattr(self, field), f'lora.{field}')
      self._set(
        field,
        tuple((p, check(f'lora.{field} for {p!r}', v)) for p, v in pairs),
      )
    rows = targets.as_pairs(self.train_rows, 'lora.train_rows')
    self._set('train_rows', tuple((p, _rows(p, ids)) for p, ids in rows))
    if not 0 <= self.dropout < 1:
      raise ConfigError(f'lora.dropout is {self.dropout}; it must be in [0, 1)')
    words = {'scaling': SCALINGS, 'variant': VARIANTS, 'init': INITS}
    for field, known in words.items():
      if getattr(self, field) not in known:
        raise ConfigError(
          f'lora.{field} {getattr(self, field)!r} is none of'
          f' {", ".join(map(repr, known))}'
        )

  def _set(self, field: str, value: Any) -> None:
    object.__setattr__(self, field, value)

  @property
  def changes_base(self) -> bool:
    """Whether adapters start with a part of the base, taken out of it."""
    return self.init in INITS_THAT_CHANGE_THE_BASE

  def scale_of(self, rank: Any, alpha: Any) -> Any:
    """Returns what the product of adapters is multiplied by.

    Args:
      rank: A rank, or an array of them; where it is zero, so is the scale.
      alpha: Likewise.
    """
    divisor = np.sqrt(rank) if self.scaling == 'rslora' else np.asarray(rank)
    return np.where(divisor > 0, alpha / np.maximum(divisor, 1), 0.0)

  @property
  def scale(self) -> float:
    """The scale of a kernel that no pattern names."""
    return float(self.scale_of(self.rank, self.alpha))


@dataclasses.dataclass(frozen=True, eq=False)
class Strength:
  """Ranks and scales of one kernel's layers.

  Attributes:
    ranks: int [*stacked]; zero for a layer without an adapter.
    scales: float32 [*stacked].
  """

  ranks: np.ndarray
  scales: np.ndarray

  @property
  def rank(self) -> int:
    """The largest rank, which all layers are padded to."""
    return int(self.ranks.max())


def strengths(
  adapted: dict[str, Target], spec: LoraSpec
) -> dict[str, Strength]:
  """Returns ranks and scales of every adapted kernel.

  Args:
    adapted: The kernels by path, from `targets.select`.
    spec: Rank and alpha, and the patterns that change them.

  Raises:
    ConfigError: A pattern matches no adapted kernel.
  """
  names = {
    path: list(targets.layer_paths(path, t.roles, t.shape))
    for path, t in adapted.items()
  }
  every = [name for path in names for name in (path, *names[path])]
  for pairs in (spec.rank_pattern, spec.alpha_pattern):
    tree.matching([pattern for pattern, _ in pairs], every, shown=list(names))
  found = {}
  for path, target in adapted.items():
    both = [(path, name) for name in names[path]]
    ranks = _per_layer(spec.rank_pattern, both, spec.rank, target)
    alphas = _per_layer(spec.alpha_pattern, both, spec.alpha, target)
    ranks = np.where(target.chosen, ranks, 0).astype(int)
    scales = spec.scale_of(ranks, alphas).astype(np.float32)
    found[path] = Strength(ranks, scales)
  return found


def _per_layer(
  pairs: Pairs, names: list[tuple[str, str]], default: Any, target: Target
) -> np.ndarray:
  values = [targets.first_match(pairs, both, default) for both in names]
  return np.array(values).reshape(target.chosen.shape)


def _rank(field: str, value: Any) -> int:
  if not (_is_number(value) and value >= 1 and value % 1 == 0):
    raise ConfigError(
      f'{field} is {value!r}; it must be a whole number, 1 or more'
    )
  return int(value)


def _alpha(field: str, value: Any) -> float:
  if not (_is_number(value) and math.isfinite(value) and value > 0):
    raise ConfigError(f'{field} is {value!r}; it must be above 0 and finite')
  return float(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _rows(pattern: str, given: Any) -> tuple[int, ...]:
  """Returns row ids, sorted as they must be."""
  listed = isinstance(given, list | tuple | range | np.ndarray)
  ids = list(given) if listed else []
  whole = all(isinstance(i, int | np.integer) for i in ids)
  if not ids or not whole or bool in map(type, ids) or min(ids) < 0:
    raise ConfigError(
      f'lora.train_rows has {given!r} for {pattern!r}; it takes row ids, 0 or'
      ' more, such as [49152, 49153]'
    )
  if ids != sorted(set(ids)):
    raise ConfigError(
      f'lora.train_rows of {pattern!r} must be sorted, each id once; it starts'
      f' {ids[:4]}'
    )
  return tuple(map(int, ids))
