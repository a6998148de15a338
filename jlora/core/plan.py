"""Which leaves of a tree a spec trains, and how."""

import dataclasses
import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from jlora.core import lora, targets, tree
from jlora.core.axes import roles_of
from jlora.core.lazy import is_lazy
from jlora.core.lora import LoraSpec, Strength
from jlora.core.quantized import is_quantized
from jlora.core.targets import Target
from jlora.errors import ConfigError


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(),
  meta_fields=('shape', 'dtype'),
)
@dataclasses.dataclass(frozen=True)
class Placeholder:
  """A node without leaves where `frozen` lacks a leaf that is trained whole.

  Attributes:
    shape: The leaf's.
    dtype: What the leaf is cast to when both halves are combined.
  """

  shape: tuple[int, ...]
  dtype: Any

  def __jax_array__(self) -> NoReturn:
    """Refuses to stand for the leaf, which is in the other half."""
    raise TypeError(
      f'this leaf of shape {self.shape} is trained whole, so the frozen half'
      ' does not have it; put both halves together with'
      ' jlora.combine(frozen, trainable, spec)'
    )


def is_frozen_leaf(node: Any) -> bool:
  """Whether a node of the frozen half counts as one leaf."""
  return is_lazy(node) or isinstance(node, Placeholder)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
  """A kernel that gets an adapter.

  Attributes:
    target: The kernel.
    strength: Ranks and scales of its layers.
    dora: Whether each output's magnitude is trained too.
  """

  target: Target
  strength: Strength
  dora: bool


@dataclasses.dataclass(frozen=True)
class Rows:
  """A table of which some entries are trained.

  Attributes:
    ids: Their indices.
    axis: 'in', the rows of an embedding, or 'out', the columns of a head.
    target: The table.
  """

  ids: tuple[int, ...]
  axis: str
  target: Target


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is trained, by path.

  Attributes:
    adapted: Kernels with an adapter.
    full: Leaves that are trained whole.
    rows: Tables of which some rows are trained.
  """

  adapted: dict[str, Adapted]
  full: list[str]
  rows: dict[str, Rows]

  @property
  def paths(self) -> set[str]:
    """All paths with something that is trained."""
    return {*self.adapted, *self.full, *self.rows}


def make_plan(leaves: dict[str, Any], spec: LoraSpec) -> Plan:
  """Returns what a spec trains of a tree.

  Args:
    leaves: Array-like leaves keyed by path.
    spec: What is trained.

  Raises:
    ConfigError: A pattern matches nothing or the wrong kind of leaf, two
      fields claim one leaf, or nothing is trained.
  """
  if not isinstance(spec, LoraSpec):
    raise ConfigError(
      f'spec is {spec!r}; it must be a LoraSpec, such as'
      " jlora.LoraSpec(targets='all-linear')"
    )
  full = tree.matching(spec.train_full, leaves)
  adapted = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  strengths = lora.strengths(adapted, spec)
  rows = _rows(leaves, spec)
  _check_claims({'targets': adapted, 'train_full': full, 'train_rows': rows})
  if not (full or adapted or rows):
    raise ConfigError(
      'nothing is trained: targets, train_full and train_rows are empty'
    )
  for path in adapted:
    _check_float(path, leaves[path])
  for path in full:
    _check_not_quantized(path, leaves[path])
  dora = spec.variant == 'dora'
  return Plan(
    {path: Adapted(t, strengths[path], dora) for path, t in adapted.items()},
    full,
    rows,
  )


def _check_claims(claims: dict[str, Any]) -> None:
  claimed: dict[str, str] = {}
  for field, paths in claims.items():
    for path in paths:
      if path in claimed:
        raise ConfigError(
          f'{path!r} is matched by {claimed[path]} and by {field}; exclude it'
          ' from one of them'
        )
      claimed[path] = field


def _check_float(path: str, leaf: Any) -> None:
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ConfigError(f'{path!r} of dtype {leaf.dtype} cannot take an adapter')


def _check_not_quantized(path: str, leaf: Any) -> None:
  if is_quantized(leaf):
    raise ConfigError(
      f'{path!r} is quantized and cannot be trained whole; leave it out of'
      ' quant.targets'
    )


def _rows(leaves: dict[str, Any], spec: LoraSpec) -> dict[str, Rows]:
  found: dict[str, Rows] = {}
  for pattern, ids in spec.train_rows:
    for path in tree.matching([pattern], leaves):
      found.setdefault(path, _rows_of(path, leaves[path], ids, spec))
  return found


def _rows_of(
  path: str, leaf: Any, ids: tuple[int, ...], spec: LoraSpec
) -> Rows:
  """Returns the rows of one table: those along its axis named vocab."""
  roles = roles_of(path, leaf.shape, spec.axes)
  axis = 'in' if roles.is_embedding else 'out' if roles.is_head else None
  if axis is None or roles.stacked:
    raise ConfigError(
      f'lora.train_rows matches {path!r} of roles {roles.text!r}, which has no'
      f" rows to train; an entry of axes such as ('{path}', 'vocab -> embed')"
      ' makes it a table'
    )
  target = targets.whole(roles, leaf.shape)
  _, size, out = target.matrix
  count = size if axis == 'in' else out
  if ids[-1] >= count:
    raise ConfigError(
      f'lora.train_rows has row {ids[-1]} of {path!r}, which has {count}; ids'
      ' count from 0'
    )
  return Rows(ids, axis, target)
