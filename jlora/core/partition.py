"""The parameters split into what is frozen and what is trained."""

import dataclasses
import functools
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core import initializers, tree
from jlora.core.axes import Roles, from_matrices, to_matrices
from jlora.core.combination import adapt
from jlora.core.lazy import LoraArray, column_lengths, dense_matrix
from jlora.core.lora import LoraSpec
from jlora.core.plan import (
  Adapted,
  Placeholder,
  Rows,
  is_frozen_leaf,
  make_plan,
)
from jlora.core.quantization import QuantSpec, quantize, quantize_leaf
from jlora.core.quantized import dequantize_leaf, is_quantized
from jlora.errors import ConfigError


def partition(
  key: jax.Array,
  params: tree.Params,
  spec: LoraSpec,
  *,
  quant: QuantSpec | None = None,
) -> tuple[Any, dict[str, Any]]:
  """Splits parameters into a frozen and a trainable tree.

  Args:
    key: PRNG key. Each leaf folds in its path, so another target does not
      change the adapters of the others.
    params: Tree of arrays, QuantizedArrays or ShapeDtypeStructs; with the
      last, the result holds ShapeDtypeStructs too. An init that changes the
      base needs dense kernels.
    spec: What is trained.
    quant: What of the frozen half is quantized, once the init had the dense
      kernels; None for plain LoRA. Leaves that are trained whole stay dense.

  Returns:
    `frozen`, shaped like `params` with a `Placeholder` where a leaf is trained
    whole, and `trainable`, a nested dict that holds, at the path of each
    target, `{'a': [..., in, rank], 'b': [..., rank, out]}`, with DoRA also
    `'magnitude': [..., out]`; `{'full': leaf}`; or `{'rows': [n, dim]}`. All of
    it is float32. With the inits 'lora' and 'gaussian', `b` is zero.

  Raises:
    ConfigError: A pattern matches nothing or the wrong kind of leaf, a rank
      exceeds its kernel, or nothing would be trained.
  """
  run = functools.partial(_partition, spec=spec, quant=quant)
  arrays = jax.tree.leaves(params)
  if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
    return jax.eval_shape(run, key, params)
  return run(key, params)


def _partition(
  key: jax.Array, params: tree.Params, spec: LoraSpec, quant: QuantSpec | None
) -> tuple[Any, dict[str, Any]]:
  leaves = tree.arrays_by_path(params, is_quantized)
  plan = make_plan(leaves, spec)
  nodes: dict[str, Any] = {}
  residuals: dict[str, jax.Array] = {}
  for path, adapted in plan.adapted.items():
    start = _start(key, path, leaves[path], adapted, spec, quant)
    nodes[path] = {'a': start.a, 'b': start.b}
    if start.residual is not None:
      residuals[path] = _as_stored(start.residual, adapted)
  frozen = freeze(params, plan.full, residuals)
  if quant is not None:
    frozen = quantize(frozen, quant)
  frozen = _with_dtypes(frozen, leaves, residuals, quant)
  if spec.variant == 'dora':
    kernels = tree.arrays_by_path(frozen, is_quantized)
    for path, adapted in plan.adapted.items():
      plain = dataclasses.replace(adapted, dora=False)
      kernel = adapt(path, kernels[path], nodes[path], plain)
      nodes[path]['magnitude'] = _magnitude(kernel)
  nodes |= {path: {'full': _as_float32(leaves[path])} for path in plan.full}
  for path, rows in plan.rows.items():
    nodes[path] = {'rows': _rows(leaves[path], rows)}
  return frozen, tree.nest(nodes)


def _start(
  key: jax.Array,
  path: str,
  leaf: Any,
  adapted: Adapted,
  spec: LoraSpec,
  quant: QuantSpec | None,
) -> initializers.Start:
  """Returns how one adapter starts."""
  _check_rank(path, adapted)
  kernel = round_trip = None
  if spec.changes_base:
    if is_quantized(leaf):
      raise ConfigError(
        f'lora.init {spec.init!r} takes a part out of the dense kernel, but'
        f' {path!r} is quantized; pass dense params and quant=QuantSpec(…)'
      )
    kernel = to_matrices(leaf, adapted.target.roles)
    round_trip = quant and functools.partial(_round_trip, quant=quant)
  return initializers.start(
    spec.init,
    tree.fold_path(key, path),
    adapted.target.matrix,
    adapted.strength,
    kernel=kernel,
    one_hot=adapted.target.roles.is_embedding,
    round_trip=round_trip,
  )


def _check_rank(path: str, adapted: Adapted) -> None:
  _, size, out = adapted.target.matrix
  rank = adapted.strength.rank
  if rank > min(size, out):
    raise ConfigError(
      f'lora.rank {rank} exceeds what {path!r} of shape {adapted.target.shape}'
      f' can use; it must be at most {min(size, out)}: lower it, or set it for'
      ' this kernel with rank_pattern'
    )


def _round_trip(kernel: jax.Array, quant: QuantSpec) -> jax.Array:
  codes = quantize_leaf(kernel, Roles((), ('in',), ('out',)), quant)
  return dequantize_leaf(codes, jnp.float32)


def _as_stored(matrices: jax.Array, adapted: Adapted) -> jax.Array:
  """Returns [*stacked, in, out] in the layout of the model's own array."""
  roles = adapted.target.roles
  _, inputs, outputs = roles.split(adapted.target.shape)
  return from_matrices(matrices, inputs, outputs, roles.order)


def freeze(
  params: tree.Params,
  full: Container[str],
  replaced: Mapping[str, jax.Array] | None = None,
) -> Any:
  """Returns the parameters with a `Placeholder` for leaves trained whole.

  Args:
    params: Tree of leaves.
    full: Paths of the leaves to leave out.
    replaced: Other arrays for some leaves, by path.
  """
  replaced = replaced or {}

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    name = tree.join(path)
    if name in full:
      return Placeholder(leaf.shape, jnp.dtype(leaf.dtype))
    return replaced.get(name, leaf)

  return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized)


def _with_dtypes(
  frozen: Any,
  leaves: Mapping[str, Any],
  residuals: Mapping[str, jax.Array],
  quant: QuantSpec | None,
) -> Any:
  """Returns replaced leaves, float32 so far, in the dtype they should have."""

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    name = tree.join(path)
    if name not in residuals:
      return leaf
    dtype = leaves[name].dtype
    if is_quantized(leaf) and quant is not None:
      dtype = quant.dtype or dtype
    return leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(visit, frozen, is_leaf=is_frozen_leaf)


def _magnitude(kernel: LoraArray) -> jax.Array:
  """Returns the column lengths [*stacked, out], a layer at a time."""
  if not kernel.stacked:
    return column_lengths(dense_matrix(kernel, jnp.float32))
  return jax.lax.map(_magnitude, kernel)


def _rows(leaf: Any, rows: Rows) -> jax.Array:
  """Returns the rows that are trained, float32 [n, dim]."""
  dense = dequantize_leaf(leaf) if is_quantized(leaf) else leaf
  table = _as_float32(to_matrices(dense, rows.target.roles))
  ids = jnp.array(rows.ids)
  return table[ids] if rows.axis == 'in' else table[:, ids].T


def _as_float32(leaf: jax.Array) -> jax.Array:
  return jnp.array(leaf, jnp.float32)
