"""What a spec makes of a tree of parameters, for people to read."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jlora.core import targets, tree
from jlora.core.lazy import is_lazy
from jlora.core.lora import LoraSpec
from jlora.core.plan import Plan, make_plan
from jlora.core.quantization import QuantSpec, quantize
from jlora.core.targets import Target
from jlora.errors import ConfigError

Leaves = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
  """Leaves of one shape that one pattern trains in the same way.

  Attributes:
    field: 'targets', 'train_full' or 'train_rows'.
    pattern: The first pattern that matches them.
    paths: Their paths.
    shape: The shape of each.
    how: Such as 'rank 16', 'rank 0-16', 'whole' or '3 rows'.
    roles: Roles of their axes; empty for leaves that are trained whole.
    parameters: Trained parameters of all of them, zero padding left out.
  """

  field: str
  pattern: str
  paths: tuple[str, ...]
  shape: tuple[int, ...]
  how: str
  roles: str
  parameters: int


@dataclasses.dataclass(frozen=True)
class Description:
  """What is trained and what stays frozen. Printed, it is a table.

  Attributes:
    rows: What is trained.
    quantized: Bytes of the frozen leaves that are quantized, by path.
    dense: Bytes of the other frozen leaves, by path.
    problems: Why the specs cannot be used as they are, with near misses;
      empty where they can.
  """

  rows: tuple[Row, ...]
  quantized: dict[str, int]
  dense: dict[str, int]
  problems: tuple[str, ...]

  @property
  def parameters(self) -> int:
    """Number of trained parameters."""
    return sum(row.parameters for row in self.rows)

  def __str__(self) -> str:
    """Returns the table."""
    lines = [f'! {problem}' for problem in self.problems]
    for key, rows in itertools.groupby(
      self.rows, lambda row: (row.field, row.pattern)
    ):
      lines.append(f'{key[0]} {key[1]!r}')
      lines += map(_row, rows)
    lines.append(
      f'trained in float32: {self.parameters:,} parameters,'
      f' {_size(4 * self.parameters)}'
    )
    lines += _frozen('frozen, quantized', self.quantized)
    lines += _frozen('frozen in full precision', self.dense)
    return '\n'.join(lines)


def describe(
  params: Any, spec: LoraSpec, *, quant: QuantSpec | None = None
) -> Description:
  """Returns what specs make of a tree of parameters; nothing is computed.

  Unlike `partition`, it goes on where a pattern matches nothing, and says so
  beside what may have been meant.

  Args:
    params: Tree of arrays, QuantizedArrays or ShapeDtypeStructs.
    spec: What is trained.
    quant: What of the rest is quantized; None for nothing more.

  Example:
    >>> print(jlora.describe(params, spec, quant=jlora.QuantSpec()))
  """
  leaves = tree.arrays_by_path(params, is_lazy)
  problems: list[str] = []
  spec = _usable(leaves, spec, problems)
  plan = None
  if spec.targets or spec.train_full or spec.train_rows or not problems:
    plan = _attempt(lambda: make_plan(leaves, spec), problems)
  plan = plan or Plan({}, [], {})
  frozen = {p: _abstract(x) for p, x in leaves.items() if p not in plan.full}
  if quant is not None:
    frozen = _attempt(lambda: quantize(frozen, quant), problems) or frozen
  sizes = {path: tree.size_of(leaf) for path, leaf in frozen.items()}
  return Description(
    rows=tuple(_rows(leaves, plan, spec)),
    quantized={p: n for p, n in sizes.items() if is_lazy(frozen[p])},
    dense={p: n for p, n in sizes.items() if not is_lazy(frozen[p])},
    problems=tuple(problems),
  )


def _attempt(run: Callable[[], Any], problems: list[str]) -> Any:
  """Returns a result, or None with the reason added to `problems`."""
  try:
    return run()
  except ConfigError as error:
    problems.append(str(error))
    return None


def _usable(leaves: Leaves, spec: LoraSpec, problems: list[str]) -> LoraSpec:
  """Returns a spec without the patterns that match nothing of use."""

  def fits(run: Callable[[], Any]) -> bool:
    return _attempt(run, problems) is not None

  words = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
  kept = [
    word
    for word in words
    if fits(lambda word=word: targets.select(leaves, _one(word), (), spec.axes))
  ]
  return dataclasses.replace(
    spec,
    targets=kept[0] if kept == [targets.ALL_LINEAR] else tuple(kept),
    train_full=tuple(
      pattern
      for pattern in spec.train_full
      if fits(lambda pattern=pattern: tree.matching([pattern], leaves))
    ),
    train_rows=tuple(
      (pattern, ids)
      for pattern, ids in spec.train_rows
      if fits(lambda pattern=pattern: tree.matching([pattern], leaves))
    ),
  )


def _one(word: str) -> str | tuple[str, ...]:
  return word if word == targets.ALL_LINEAR else (word,)


def _rows(leaves: Leaves, plan: Plan, spec: LoraSpec) -> list[Row]:
  """Returns what is trained, leaves that are alike in one row."""
  rows: dict[Any, Row] = {}
  for row in (
    *_adapted(plan, spec),
    *_full(leaves, plan, spec),
    *_table_rows(plan, spec),
  ):
    alike = (row.field, row.pattern, row.shape, row.how, row.roles)
    known = rows.get(alike, dataclasses.replace(row, paths=(), parameters=0))
    rows[alike] = dataclasses.replace(
      known,
      paths=known.paths + row.paths,
      parameters=known.parameters + row.parameters,
    )
  return sorted(
    rows.values(), key=lambda row: (_FIELDS.index(row.field), row.pattern)
  )


_FIELDS = ('targets', 'train_full', 'train_rows')


def _adapted(plan: Plan, spec: LoraSpec) -> Iterator[Row]:
  for path, adapted in plan.adapted.items():
    target, ranks = adapted.target, adapted.strength.ranks
    _, size, out = target.matrix
    magnitudes = np.count_nonzero(ranks) * out if adapted.dora else 0
    low, high = ranks.min(), ranks.max()
    yield Row(
      'targets',
      _target_of(path, target, spec),
      (path,),
      target.shape,
      f'rank {high}' if low == high else f'rank {low}-{high}',
      target.roles.text,
      int(ranks.sum() * (size + out) + magnitudes),
    )


def _target_of(path: str, target: Target, spec: LoraSpec) -> str:
  """Returns the first of the targets that names a kernel."""
  if spec.targets == targets.ALL_LINEAR:
    return spec.targets
  layers = targets.layer_paths(path, target.roles, target.shape)
  names = [path, *layers]
  found = (p for p in spec.targets if any(tree.matches([p], n) for n in names))
  return next(found)


def _full(leaves: Leaves, plan: Plan, spec: LoraSpec) -> Iterator[Row]:
  for path in plan.full:
    pattern = next(p for p in spec.train_full if tree.matches([p], path))
    shape = leaves[path].shape
    count = math.prod(shape)
    yield Row('train_full', pattern, (path,), shape, 'whole', '', count)


def _table_rows(plan: Plan, spec: LoraSpec) -> Iterator[Row]:
  for path, rows in plan.rows.items():
    pattern = next(p for p, _ in spec.train_rows if tree.matches([p], path))
    _, size, out = rows.target.matrix
    yield Row(
      'train_rows',
      pattern,
      (path,),
      rows.target.shape,
      f'{len(rows.ids)} rows',
      rows.target.roles.text,
      len(rows.ids) * (out if rows.axis == 'in' else size),
    )


def _abstract(leaf: Any) -> Any:
  """Returns a leaf without its numbers."""
  if is_lazy(leaf):
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _row(row: Row) -> str:
  shape = ' × '.join(map(str, row.shape))
  more = f' and {len(row.paths) - 1} more' if len(row.paths) > 1 else ''
  count = f'{row.parameters:>12,} parameters'
  return (
    f'  {count}  {row.how:<9}  {shape:<18} {row.roles:<24} {row.paths[0]}{more}'
  )


def _frozen(title: str, sizes: Mapping[str, int]) -> list[str]:
  """Returns a line with the total, and the largest leaves below it."""
  if not sizes:
    return []
  total, count = sum(sizes.values()), len(sizes)
  leaves = 'leaf' if count == 1 else 'leaves'
  lines = [f'{title}: {count} {leaves}, {_size(total)}']
  largest = sorted(sizes, key=lambda path: -sizes[path])[:_SHOWN]
  lines += [f'  {_size(sizes[path]):>12}  {path}' for path in largest]
  if count > _SHOWN:
    lines.append(f'  {"":>12}  and {count - _SHOWN} smaller ones')
  return lines


_SHOWN = 4  # frozen leaves that are listed


def _size(count: float) -> str:
  """Returns bytes for people, such as '54.8 MB'."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000 or unit == 'GB':
      break
    count /= 1000
  return f'{count:.1f} {unit}' if unit != 'B' else f'{count} B'
