"""Which leaves a spec means."""

import re
from collections.abc import Mapping
from typing import Any

from jlora.core import axes as axes_lib
from jlora.core import tree
from jlora.errors import ConfigError

ALL_LINEAR = 'all-linear'


def as_patterns(value: Any, field: str) -> tuple[str, ...]:
  """Returns one pattern, or a sequence of them, as a tuple."""
  if not isinstance(value, str | list | tuple):
    raise ConfigError(f'{field} is {value!r}; it takes patterns (str)')
  patterns = (value,) if isinstance(value, str) else tuple(value)
  for pattern in patterns:
    if not isinstance(pattern, str):
      raise ConfigError(f'{field} holds {pattern!r}; it takes patterns (str)')
  return patterns


def as_axes(value: Any) -> axes_lib.Axes:
  """Returns pairs of pattern and roles as nested tuples, each of them checked.

  Args:
    value: A mapping or a sequence of pairs.
  """
  pairs = value.items() if isinstance(value, Mapping) else value
  axes = tuple((pattern, roles) for pattern, roles in pairs)
  for _, roles in axes:
    axes_lib.parse_roles(roles)
  return axes


def normalize_patterns(spec: Any, *fields: str) -> None:
  """Turns a frozen spec's pattern fields and its `axes` into tuples."""
  for field in fields:
    value = getattr(spec, field)
    if value != ALL_LINEAR:
      value = as_patterns(value, field)
    object.__setattr__(spec, field, value)
  object.__setattr__(spec, 'axes', as_axes(spec.axes))


def select(
  leaves: Mapping[str, Any],
  targets: str | tuple[str, ...],
  exclude: tuple[str, ...],
  axes: axes_lib.Axes,
) -> dict[str, axes_lib.Roles]:
  """Returns the kernels that are meant, with the roles of their axes.

  Args:
    leaves: Array-like leaves keyed by path.
    targets: `'all-linear'` (every leaf named `kernel` with two axes or more
      that is no output head) or patterns.
    exclude: Patterns that take leaves out again.
    axes: Roles of the kernels' axes.

  Raises:
    ConfigError: A pattern matches nothing, a preset was not resolved, or a
      matched leaf is no kernel.
  """
  if targets == ALL_LINEAR:
    found = _all_linear(leaves, axes)
  else:
    _refuse_presets(targets, leaves)
    paths = tree.matching(targets, leaves)
    found = {p: axes_lib.roles_of(p, leaves[p].shape, axes) for p in paths}
  left_out = set(tree.matching(exclude, leaves))
  return {path: roles for path, roles in found.items() if path not in left_out}


def _all_linear(
  leaves: Mapping[str, Any], axes: axes_lib.Axes
) -> dict[str, axes_lib.Roles]:
  kernels = {
    path: axes_lib.roles_of(path, leaf.shape, axes)
    for path, leaf in leaves.items()
    if path.rpartition('/')[2] == 'kernel' and len(leaf.shape) >= 2
  }
  found = {path: r for path, r in kernels.items() if not r.is_head}
  if not found:
    raise ConfigError(
      f"targets 'all-linear' matches none of the {len(leaves)} leaves: none is"
      ' named kernel; give patterns over paths instead'
    )
  return found


def _refuse_presets(
  targets: tuple[str, ...], leaves: Mapping[str, Any]
) -> None:
  for word in targets:
    if re.fullmatch(r'[a-z-]+', word) and word not in leaves:
      raise ConfigError(
        f'target {word!r} is a preset of a model family, or no pattern over'
        ' whole paths; pass the spec through'
        ' jlora.models.families.resolve(spec, config), or write a pattern such'
        f" as '.*/{word}/.*/kernel'"
      )
