"""Which leaves a spec means, and which of their layers."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.core import axes as axes_lib
from jlora.core import tree
from jlora.core.axes import Roles
from jlora.errors import ConfigError

ALL_LINEAR = 'all-linear'


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
  """A kernel that a spec means.

  Attributes:
    roles: Roles of its axes.
    shape: Its shape.
    chosen: bool [*stacked], which of its layers are meant.
  """

  roles: Roles
  shape: tuple[int, ...]
  chosen: np.ndarray

  @property
  def matrix(self) -> tuple[tuple[int, ...], int, int]:
    """The stacked sizes and the flattened `in` and `out`."""
    return axes_lib.matrix_shape(self.shape, self.roles)


def as_patterns(value: Any, field: str) -> tuple[str, ...]:
  """Returns one pattern, or a sequence of them, as a tuple."""
  if not isinstance(value, str | list | tuple):
    raise ConfigError(f'{field} is {value!r}; it takes patterns (str)')
  patterns = (value,) if isinstance(value, str) else tuple(value)
  for pattern in patterns:
    if not isinstance(pattern, str):
      raise ConfigError(f'{field} holds {pattern!r}; it takes patterns (str)')
  return patterns


def as_pairs(value: Any, field: str) -> tuple[tuple[str, Any], ...]:
  """Returns a mapping from patterns, or a sequence of pairs, as a tuple."""
  pairs = value.items() if isinstance(value, Mapping) else value
  try:
    return tuple((str(pattern), entry) for pattern, entry in pairs)
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f'{field} is {value!r}; it takes pairs of a pattern and a value'
    ) from error


def as_axes(value: Any) -> axes_lib.Axes:
  """Returns pairs of pattern and roles as nested tuples, each of them checked.

  Args:
    value: A mapping or a sequence of pairs.
  """
  axes = as_pairs(value, 'axes')
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


def layer_paths(path: str, target_roles: Roles, shape: Any) -> Iterator[str]:
  """Yields the path of every layer of a kernel, in row-major order.

  A layer's index stands behind the component that is named like the stacked
  axis, or behind the first where there is none: with roles `layers | in ->
  out`, layer 3 of `layers/mlp/up/kernel` is `layers/3/mlp/up/kernel`.

  Args:
    path: The kernel's path.
    target_roles: Roles of its axes.
    shape: Its shape.
  """
  stacked, _, _ = target_roles.split(shape)
  for index in itertools.product(*map(range, stacked)):
    parts = path.split('/')
    for name, i in reversed(
      list(zip(target_roles.stacked, index, strict=True))
    ):
      place = parts.index(name) + 1 if name in parts else 1
      parts.insert(place, str(i))
    yield '/'.join(parts)


def first_match(
  entries: tuple[tuple[str, Any], ...], paths: tuple[str, ...], default: Any
) -> Any:
  """Returns the value of the first pattern that matches one of `paths`."""
  for pattern, value in entries:
    if any(tree.matches((pattern,), path) for path in paths):
      return value
  return default


def select(
  leaves: Mapping[str, Any],
  targets: str | tuple[str, ...],
  exclude: tuple[str, ...],
  axes: axes_lib.Axes,
) -> dict[str, Target]:
  """Returns the kernels that are meant.

  Args:
    leaves: Array-like leaves keyed by path.
    targets: `'all-linear'` (every leaf named `kernel` with two axes or more
      that is no output head) or patterns over whole paths, also those of
      single layers (`layer_paths`).
    exclude: Patterns that take leaves, or layers of them, out again.
    axes: Roles of the kernels' axes.

  Raises:
    ConfigError: A pattern matches nothing, a preset was not resolved, or a
      matched leaf is no kernel.
  """
  if targets == ALL_LINEAR:
    found = _all_linear(leaves, exclude, axes)
  else:
    _refuse_presets(targets, leaves)
    found = _matching(targets, leaves, axes)
  taken_out = {}
  if exclude:
    taken_out = _matching(exclude, leaves, axes, of_kernels=False)
  for path in found.keys() & taken_out.keys():
    chosen = found[path].chosen & ~taken_out[path].chosen
    found[path] = dataclasses.replace(found[path], chosen=chosen)
  return {path: t for path, t in found.items() if t.chosen.any()}


def _all_linear(
  leaves: Mapping[str, Any], exclude: tuple[str, ...], axes: axes_lib.Axes
) -> dict[str, Target]:
  kernels = {
    path: leaf
    for path, leaf in leaves.items()
    if path.rpartition('/')[2] == 'kernel' and len(leaf.shape) >= 2
  }
  if not kernels:
    raise ConfigError(
      f"targets 'all-linear' matches none of the {len(leaves)} leaves: none is"
      ' named kernel; give patterns over paths instead'
    )
  found = {
    path: whole(axes_lib.roles_of(path, leaf.shape, axes), leaf.shape)
    for path, leaf in kernels.items()
    if not tree.matches(exclude, path)
  }
  return {path: t for path, t in found.items() if not t.roles.is_head}


def whole(roles: Roles, shape: tuple[int, ...]) -> Target:
  """Returns a kernel of which every layer is meant."""
  return Target(roles, shape, np.ones(roles.split(shape)[0], bool))


def _matching(
  patterns: tuple[str, ...],
  leaves: Mapping[str, Any],
  axes: axes_lib.Axes,
  *,
  of_kernels: bool = True,
) -> dict[str, Target]:
  """Returns what patterns over the paths of leaves or layers match.

  Args:
    patterns: Each must match something.
    leaves: Leaves by path.
    axes: Roles of the kernels' axes.
    of_kernels: Whether a match must be a kernel.
  """
  layers = _layers_by_path(leaves, axes)
  every = [name for path in leaves for name in (path, *layers.get(path, ()))]
  shown = _likely(leaves) if of_kernels else list(leaves)
  hits = set(tree.matching(patterns, every, shown=shown))
  found: dict[str, Target] = {}
  for path, leaf in leaves.items():
    names = layers.get(path, [])
    if path not in hits and hits.isdisjoint(names):
      continue
    if path not in layers and not of_kernels:
      continue  # excluding what could not be a target anyway
    roles = axes_lib.roles_of(path, leaf.shape, axes)
    target = whole(roles, leaf.shape)
    if path not in hits:
      chosen = np.array([name in hits for name in names])
      chosen = chosen.reshape(target.chosen.shape)
      target = dataclasses.replace(target, chosen=chosen)
    found[path] = target
  return found


def _layers_by_path(
  leaves: Mapping[str, Any], axes: axes_lib.Axes
) -> dict[str, list[str]]:
  """Returns the layers' paths of every leaf that is a kernel."""
  layers = {}
  for path, leaf in leaves.items():
    try:
      roles = axes_lib.roles_of(path, leaf.shape, axes)
    except ConfigError:
      continue  # no kernel, which is an error only for one that is meant
    names = layer_paths(path, roles, leaf.shape) if roles.stacked else ()
    layers[path] = list(names)
  return layers


def _likely(leaves: Mapping[str, Any]) -> list[str]:
  """Returns paths of leaves that may be kernels, those named so first."""
  paths = [path for path, leaf in leaves.items() if len(leaf.shape) > 1]
  return sorted(paths, key=lambda path: not path.endswith('kernel'))


def _refuse_presets(
  targets: tuple[str, ...], leaves: Mapping[str, Any]
) -> None:
  for word in targets:
    if re.fullmatch(r'[a-z-]+', word) and word not in leaves:
      raise ConfigError(
        f'target {word!r} is a preset of a model family, or no pattern over'
        ' whole paths; pass the spec through'
        ' jlora.models.families.resolve(spec, config), or write a pattern such'
        f' as {tree.near(word, _likely(leaves) or list(leaves))[0]!r}'
      )
