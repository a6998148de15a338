"""Paths into nested trees, and leaves found by patterns over them."""

import difflib
import functools
import re
import zlib
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


def arrays_by_path(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """Returns the leaves that have a shape and a dtype, keyed by their path."""
  leaves = leaves_by_path(tree, is_leaf)
  return {
    path: leaf
    for path, leaf in leaves.items()
    if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')
  }


def nodes_by_path(trainable: Any) -> dict[str, dict[str, Any]]:
  """Returns what is trained of each leaf, by the leaf's path.

  Args:
    trainable: From `jlora.partition`, whose last keys say what a leaf is.
  """
  nodes: dict[str, dict[str, Any]] = {}
  for path, leaf in leaves_by_path(trainable).items():
    parent, _, name = path.rpartition('/')
    nodes.setdefault(parent, {})[name] = leaf
  return nodes


def size_of(tree: Any) -> int:
  """Returns the bytes of all arrays of a tree, abstract ones included."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def fold_path(key: jax.Array, path: str) -> jax.Array:
  """Returns a PRNG key for one leaf; it depends on the path alone."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


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


def matches(patterns: Iterable[str], path: str) -> bool:
  """Whether some pattern matches a whole path."""
  return any(_compiled(pattern).fullmatch(path) for pattern in patterns)


def matching(
  patterns: Iterable[str],
  paths: Iterable[str],
  *,
  shown: Iterable[str] | None = None,
) -> list[str]:
  """Returns the paths that some pattern matches as a whole, in their order.

  Args:
    patterns: Regular expressions over whole paths; each must match.
    paths: Paths joined with `/`.
    shown: Those that an error may suggest; None is all of them.

  Raises:
    ConfigError: A pattern is no regular expression or matches no path. The
      message shows the closest paths.
  """
  paths = list(paths)
  found: set[str] = set()
  for pattern in patterns:
    hits = [path for path in paths if _compiled(pattern).fullmatch(path)]
    if not hits:
      raise ConfigError(
        _no_match(pattern, paths if shown is None else list(shown))
      )
    found.update(hits)
  return [path for path in paths if path in found]


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ConfigError(
      f'pattern {pattern!r} is no regular expression: {error}'
    ) from error


def _no_match(pattern: str, paths: list[str]) -> str:
  close = near(pattern, paths)
  hint = ' or '.join(map(repr, close))
  return (
    f'pattern {pattern!r} matches none of the {len(paths)} leaves; a pattern'
    f' must match a whole path{f", such as {hint}" if hint else ""}'
  )


def near(pattern: str, paths: list[str]) -> list[str]:
  """Returns what may have been meant by a pattern that matches nothing.

  Args:
    pattern: A regular expression.
    paths: What it could have matched.

  Returns:
    A pattern made longer so that it matches, where there is one, and the
    closest paths; at most three.
  """
  part = [path for path in paths if _compiled(pattern).search(path)]
  if not part:
    return difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
  rest = part[0][_compiled(pattern).search(part[0]).end() :]
  *between, name = rest.split('/')
  rest = f'.*/{name}' if len(between) > 1 else rest
  longer = f'.*{pattern}{rest}'
  fits = _compiled(longer).fullmatch(part[0])
  return [longer, *part[:2]] if fits else part[:3]
