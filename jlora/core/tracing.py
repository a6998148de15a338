"""A function as a traced program, and where its array arguments stood."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex

from jlora.core import tree
from jlora.core.lazy import is_lazy


class Program(NamedTuple):
  """A traced function.

  Attributes:
    closed: The program, with one input for each array-like leaf.
    inputs: Those leaves.
    paths: Where they stood: the argument's position or name, then the path.
    results: Structure of the results.
  """

  closed: jex.ClosedJaxpr
  inputs: list[Any]
  paths: list[str]
  results: Any


def trace(
  fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Program:
  """Traces a function on plain abstract arrays.

  Args:
    fn: The function. Array-like leaves of its arguments are traced, lazy ones
      as the arrays they stand for; everything else is closed over.
    args: Its arguments.
    kwargs: Likewise.
  """
  entries, treedef = jax.tree_util.tree_flatten_with_path(
    (tuple(args), dict(kwargs)), is_leaf=is_lazy
  )
  leaves = [leaf for _, leaf in entries]
  traced = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

  def flat(*arrays: jax.Array) -> Any:
    filled = list(leaves)
    for i, array in zip(traced, arrays, strict=True):
      filled[i] = array
    inner_args, inner_kwargs = jax.tree.unflatten(treedef, filled)
    return fn(*inner_args, **inner_kwargs)

  abstract = [_abstract(leaves[i]) for i in traced]
  closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*abstract)
  return Program(
    closed,
    [leaves[i] for i in traced],
    [tree.join(entries[i][0][1:]) for i in traced],
    jax.tree.structure(shapes),
  )


def _is_array(leaf: Any) -> bool:
  kinds = jax.Array | np.ndarray | jax.ShapeDtypeStruct
  return is_lazy(leaf) or isinstance(leaf, kinds)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  weak = getattr(leaf, 'weak_type', False)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)
