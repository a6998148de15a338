"""Paths into nested trees, and leaves found by patterns over them."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jlora.errors import ConfigError

Params = Mapping[str, Any]


def join(path: tuple[Any, ...]) -> str:
  """Returns a key path of `jax.tree_util` as names joined with `/`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def leaves_by_path(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """Returns the leaves of `tree` keyed by their path, in the tree's order."""
  entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {join(path): leaf for path, leaf in entries}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict whose leaves are `leaves`, keyed by path."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def matching(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
  """Returns the paths that some pattern matches as a whole, in their order.

  Args:
    patterns: Regular expressions over whole paths; each must match.
    paths: Paths joined with `/`.

  Raises:
    ConfigError: A pattern is no regular expression or matches no path. The
      message shows the closest paths.
  """
  paths = list(paths)
  found: set[str] = set()
  for pattern in patterns:
    hits = [path for path in paths if _compile(pattern).fullmatch(path)]
    if not hits:
      raise ConfigError(_no_match(pattern, paths))
    found.update(hits)
  return [path for path in paths if path in found]


def _compile(pattern: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ConfigError(
      f'pattern {pattern!r} is no regular expression: {error}'
    ) from error


def _no_match(pattern: str, paths: list[str]) -> str:
  close = [path for path in paths if re.search(pattern, path)][:3]
  close = close or difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
  hint = ' or '.join(map(repr, close))
  return (
    f'pattern {pattern!r} matches none of the {len(paths)} leaves; a pattern'
    f' must match a whole path{f", such as {hint}" if hint else ""}'
  )
