"""Parameters as plain arrays, formed once where many tokens are generated.

A lazy leaf is decoded again, and its adapter multiplied again, for each token.
Plain arrays cost memory instead: those of `count_plain`, beside the codes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jlora.core.lazy import densify, is_lazy
from jlora.core.tree import join, leaves_by_path

Placed = Callable[[str, Any], Sharding | None]


def _anywhere(path: str, leaf: Any) -> None:
  """Leaves the place of an array to the compiler."""


def make_plain(params: Any, dtype: Any, placed: Placed = _anywhere) -> Any:
  """Returns parameters as plain arrays: what `jlora.merge` defines.

  Leaves are formed one after another and a layer at a time, so that there is
  no more scratch than one layer's. Plain leaves of this dtype are not copied.

  Args:
    params: From `combine`.
    dtype: Of every leaf; sums are formed in float32 and rounded once.
    placed: (path, leaf) -> where the plain leaf lies.
  """
  dtype = jnp.dtype(dtype)

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    if not _is_formed(leaf, dtype):
      return leaf
    sharding = placed(join(path), leaf)
    return jax.jit(_form, static_argnums=1, out_shardings=sharding)(leaf, dtype)

  return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_lazy)


def count_plain(params: Any, dtype: Any, placed: Placed = _anywhere) -> int:
  """Returns the bytes that `make_plain` takes on one device.

  Args:
    params: From `combine`, as arrays or as shapes.
    dtype: As there.
    placed: As there.
  """
  dtype, total = jnp.dtype(dtype), 0
  for path, leaf in leaves_by_path(params, is_lazy).items():
    if _is_formed(leaf, dtype):
      sharding = placed(path, leaf)
      shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
      total += math.prod(shape) * dtype.itemsize
  return total


def _is_formed(leaf: Any, dtype: Any) -> bool:
  """Whether a leaf is not there yet as a plain array of this dtype."""
  return is_lazy(leaf) or leaf.dtype != dtype


def _form(leaf: Any, dtype: Any) -> jax.Array:
  """Returns a leaf as a plain array, formed a layer at a time."""
  form = functools.partial(densify, dtype=dtype)
  in_layers = is_lazy(leaf) and leaf.stacked and not leaf.order
  return jax.lax.map(form, leaf) if in_layers else form(leaf)
