"""What an adapter trains: by the paths of a LoraSpec, or by PEFT's modules."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora.checkpoints.peft_modules import Modules, make_modules
from jlora.core import axes, targets
from jlora.core.lora import LoraSpec
from jlora.core.plan import Plan, make_plan
from jlora.errors import AdapterError
from jlora.models import families, layout
from jlora.models.config import DecoderConfig
from jlora.models.layout import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """What an adapter trains, by the names of modules.

  Attributes:
    pairs: Rank and alpha of every module with a low-rank pair.
    saved: Modules that are stored whole.
    rows: Ids of the trained rows of modules that are not trained otherwise.
    dropout: What the adapter was trained with.
    scaling: As in LoraSpec.
    variant: As in LoraSpec.
  """

  pairs: Mapping[str, tuple[int, float]]
  saved: frozenset[str]
  rows: Mapping[str, tuple[int, ...]]
  dropout: float
  scaling: str
  variant: str

  @property
  def usual(self) -> tuple[int, float]:
    """The most frequent rank and the most frequent alpha."""
    ranks, alphas = zip(*map(self.pairs.get, sorted(self.pairs)), strict=True)
    return most_frequent(ranks), most_frequent(alphas)

  def pairs_of(self, weight: Weight) -> list[tuple[int, float] | None]:
    """Returns rank and alpha of each module of a leaf, where it has a pair.

    A bias has none: those of its modules are for the kernel beside it.

    Args:
      weight: The leaf.
    """
    pairs = {} if weight.kind == 'bias' else self.pairs
    return [pairs.get(module) for module in weight.modules]

  def doubled(self) -> 'Selection':
    """Returns the same with twice the ranks and unchanged scales."""
    factor = math.sqrt(2) if self.scaling == 'rslora' else 2
    pairs = {m: (2 * r, factor * alpha) for m, (r, alpha) in self.pairs.items()}
    return dataclasses.replace(self, pairs=pairs)


def most_frequent(values: Iterable[Any]) -> Any:
  """Returns the first of the values that none occurs more often than."""
  return collections.Counter(values).most_common(1)[0][0]


def select(spec: LoraSpec, config: DecoderConfig) -> Selection:
  """Returns what a spec trains of a decoder.

  Args:
    spec: The spec.
    config: The decoder's.

  Raises:
    AdapterError: PEFT has no form for it.
    ConfigError: The spec does not fit the decoder.
  """
  base = make_modules(config)
  weights = layout.by_path(config)
  leaves = {
    path: jax.ShapeDtypeStruct(weight.shape, np.float32)
    for path, weight in weights.items()
  }
  plan = make_plan(leaves, spec)
  _refuse_halves(plan, weights)
  selection = Selection(
    pairs=dict(_pairs(plan, spec, weights, base)),
    saved=frozenset(m for p in plan.full for m in _holders(weights[p], base)),
    rows={
      module: rows.ids
      for path, rows in plan.rows.items()
      for module in weights[path].modules
    },
    dropout=spec.dropout,
    scaling=spec.scaling,
    variant=spec.variant,
  )
  check_selection(selection, base)
  return selection


def _refuse_halves(plan: Plan, weights: Mapping[str, Weight]) -> None:
  """Refuses to save a kernel without its bias, or the other way round."""
  for path in plan.full:
    for other, weight in weights.items():
      if weight.modules == weights[path].modules and other not in plan.full:
        raise AdapterError(
          f'{path!r} is trained in full and {other!r} is not; PEFT saves a'
          ' module whole (modules_to_save): train both, or neither'
        )


def _pairs(
  plan: Plan, spec: LoraSpec, weights: Mapping[str, Weight], base: Modules
) -> Iterator[tuple[str, tuple[int, float]]]:
  """Yields every module with a pair, its rank and its alpha."""
  for path, adapted in plan.adapted.items():
    weight = weights[path]
    if not weight.linear and base.embedding not in weight.modules:
      raise AdapterError(
        f'{path!r} is neither a linear layer nor the embedding, and PEFT has no'
        ' low-rank pair for it; train it with train_full'
      )
    ranks = adapted.strength.ranks.flat
    layers = zip(weight.modules, layer_names(weight), ranks, strict=True)
    for module, name, rank in layers:
      found = targets.first_match(spec.alpha_pattern, (path, name), spec.alpha)
      if rank:
        yield module, (int(rank), found)
        if twin := base.twin(module):
          yield twin, (int(rank), found)


def _holders(weight: Weight, base: Modules) -> list[str]:
  """Returns the modules of a leaf and the one that shares its tensor."""
  return [*weight.modules, *filter(None, map(base.twin, weight.modules))]


def check_selection(selection: Selection, base: Modules) -> None:
  """Checks that a decoder and its model in PEFT compute the same.

  Args:
    selection: What is trained.
    base: Modules of the base.

  Raises:
    AdapterError: The two are different functions, or a module is trained in
      two ways.
  """
  tied = base.shared & selection.pairs.keys()
  if tied and selection.variant == 'dora':
    raise AdapterError(
      f'DoRA of the tied {base.embedding} and {base.head}: PEFT norms one over'
      ' the vocabulary and the other over the features, but this base has one'
      ' tensor for both; exclude the embedding'
    )
  strengths = {selection.pairs[module] for module in tied}
  if len(strengths) > 1:
    raise AdapterError(
      f'{base.embedding} and {base.head} have rank and alpha'
      f' {sorted(strengths)}, but this base has one tensor for both'
    )
  if whole := selection.saved & base.experts:
    raise AdapterError(
      f'{min(whole)!r} is trained in full, and PEFT has no file for single'
      ' experts; adapt them with targets, or train no adapters at all'
    )
  paired = selection.pairs.keys() & base.owners.keys()
  if paired and selection.variant == 'dora':
    raise AdapterError(
      f'{min(paired)!r} has DoRA of experts or of their router, which PEFT does'
      ' not compute; exclude them, or take the variant lora'
    )
  kinds = (selection.pairs.keys(), selection.saved, selection.rows.keys())
  counts = collections.Counter(module for kind in kinds for module in kind)
  twice = sorted(module for module, count in counts.items() if count > 1)
  if twice:
    raise AdapterError(
      f'{twice[0]!r} is trained in two ways; it can have a low-rank pair, be'
      ' stored whole, or have trained rows'
    )


def layer_names(weight: Weight) -> list[str]:
  """Returns the path of every layer of a leaf, as patterns see it."""
  roles = axes.roles_of(weight.path, weight.shape, families.AXES)
  return list(targets.layer_paths(weight.path, roles, weight.shape))


def spec_of(selection: Selection, config: DecoderConfig) -> LoraSpec:
  """Returns a spec that trains what a selection does, at the same scales.

  Args:
    selection: What is trained.
    config: The decoder's.

  Returns:
    A spec whose patterns are paths of leaves and, where the layers of a leaf
    differ, of layers.
  """
  rank, alpha = selection.usual
  chosen: list[str] = []
  ranks: list[tuple[str, int]] = []
  alphas: list[tuple[str, float]] = []
  whole, rows = [], []
  for weight in layout.weights(config):
    first = weight.modules[0]
    pairs = selection.pairs_of(weight)
    if any(pairs):
      chosen += _chosen(weight, pairs)
      ranks += _patterns(weight, [p and p[0] for p in pairs], rank)
      alphas += _patterns(weight, [p and p[1] for p in pairs], alpha)
    elif first in selection.saved:
      whole.append(weight.path)
    elif first in selection.rows:
      rows.append((weight.path, sorted(selection.rows[first])))
  return LoraSpec(
    rank=rank,
    alpha=alpha,
    targets=tuple(chosen),
    axes=families.AXES,
    rank_pattern=ranks,
    alpha_pattern=alphas,
    scaling=selection.scaling,
    variant=selection.variant,
    dropout=selection.dropout,
    train_full=tuple(whole),
    train_rows=rows,
  )


def _chosen(weight: Weight, pairs: Sequence[Any]) -> list[str]:
  """Returns the leaf's path, or those of the layers that have a pair."""
  if all(pairs):
    return [weight.path]
  names = zip(layer_names(weight), pairs, strict=True)
  return [name for name, pair in names if pair]


def _patterns(
  weight: Weight, values: Sequence[Any], usual: Any
) -> list[tuple[str, Any]]:
  """Returns pattern and value wherever the value is not the usual one.

  Args:
    weight: A leaf.
    values: One a layer; None for one without a pair.
    usual: What holds where no pattern matches.
  """
  names, distinct = layer_names(weight), set(values) - {None}
  if len(distinct) == 1:
    names, values = [weight.path], list(distinct)
  entries = zip(names, values, strict=True)
  return [(name, v) for name, v in entries if v is not None and v != usual]
