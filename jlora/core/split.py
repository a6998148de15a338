"""What becomes of one leaf of a tree: a frozen half and a trained one.

`partition` does it for a whole tree; a base that is read leaf by leaf goes
through here while it is read, so that a dense kernel is dropped before the next
one comes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.core import initializers, tree
from jlora.core.axes import Roles, from_matrices, to_matrices
from jlora.core.combination import adapt
from jlora.core.decompositions import Start
from jlora.core.lazy import LoraArray, column_lengths, dense_matrix
from jlora.core.lora import LoraSpec
from jlora.core.plan import Adapted, Placeholder, Plan, Rows, make_plan
from jlora.core.quantization import QuantSpec, quantize_leaf, select_whole
from jlora.core.quantized import dequantize_leaf, is_quantized
from jlora.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """What becomes of every leaf of a tree.

  Attributes:
    spec: What is trained; None for nothing.
    plan: The same, by path.
    quant: How kernels are quantized; None for no quantization.
    quantized: Roles of the kernels that are, by path.
  """

  spec: LoraSpec | None
  plan: Plan
  quant: QuantSpec | None
  quantized: dict[str, Roles]


def make_split(
  leaves: Mapping[str, Any], spec: LoraSpec | None, quant: QuantSpec | None
) -> Split:
  """Returns what specs make of a tree.

  Args:
    leaves: Array-like leaves by path; only shapes and dtypes are read.
    spec: What is trained; None for nothing.
    quant: What of the frozen half is quantized; None for nothing.

  Raises:
    ConfigError: A pattern matches nothing or the wrong kind of leaf, a rank
      exceeds its kernel, or nothing would be trained.
  """
  plan = make_plan(leaves, spec) if spec else Plan({}, [], {})
  for path, adapted in plan.adapted.items():
    _check_rank(path, adapted)
  if spec and spec.changes_base and not plan.adapted:
    raise ConfigError(
      f'lora.init {spec.init!r} starts adapters, and no kernel has one; give'
      " lora.targets, or use init 'lora'"
    )
  rest = {path: x for path, x in leaves.items() if path not in plan.full}
  quantized = select_whole(rest, quant) if quant else {}
  if spec and spec.init == 'loftq':
    _check_quantized(plan, quantized)
  return Split(spec, plan, quant, quantized)


def _check_quantized(plan: Plan, quantized: Mapping[str, Any]) -> None:
  for path in plan.adapted:
    if path not in quantized:
      raise ConfigError(
        "lora.init 'loftq' starts from the error of quantization, and"
        f' {path!r} is not quantized; let quant cover it, exclude it from'
        " lora.targets, or use 'pissa'"
      )


def _check_rank(path: str, adapted: Adapted) -> None:
  _, size, out = adapted.target.matrix
  rank = adapted.strength.rank
  if rank > min(size, out):
    raise ConfigError(
      f'lora.rank {rank} exceeds what {path!r} of shape {adapted.target.shape}'
      f' can use; it must be at most {min(size, out)}: lower it, or have a'
      ' rank_pattern for this kernel'
    )


class SplitLeaf(NamedTuple):
  """What becomes of a leaf.

  Attributes:
    frozen: An array, a QuantizedArray or, where the leaf is trained whole, a
      `Placeholder`.
    trained: In float32 'a' and 'b' of an adapter, with DoRA 'magnitude' too;
      'full'; or 'rows'. Empty for a leaf that is not trained.
    start: How an adapter starts that is a part of its base; else None.
  """

  frozen: Any
  trained: dict[str, jax.Array]
  start: Start | None = None


def split_leaf(
  split: Split,
  key: jax.Array,
  path: str,
  leaf: Any,
  *,
  dtype: Any = None,
  start: Start | None = None,
) -> SplitLeaf:
  """Returns what is frozen of a leaf, and what is trained.

  Args:
    split: Of the tree that the leaf is in.
    key: PRNG key of the whole tree; the leaf folds in its path.
    path: The leaf's.
    leaf: An array or a QuantizedArray.
    dtype: Of the frozen half, or what it computes in where it is quantized and
      `quant.dtype` is None; None keeps the leaf's.
    start: How its adapter started before, where it is a part of its base; None
      finds it.

  Raises:
    ConfigError: The init needs what is missing.
  """
  plan = split.plan
  if path in plan.full:
    whole = Placeholder(leaf.shape, jnp.dtype(leaf.dtype))
    return SplitLeaf(whole, {'full': _as_float32(leaf)})
  node, dtype = {}, dtype or leaf.dtype
  adapted = plan.adapted.get(path)
  changed = adapted is not None and split.spec.changes_base
  if path in plan.rows:
    node = {'rows': _rows(leaf, plan.rows[path])}
  if adapted is not None:
    start = start or find_start(split, key, path, leaf)
    node = {'a': start.a, 'b': start.b}
    if changed:
      leaf = _take_out(leaf, start, adapted)
  frozen = _freeze(split, path, leaf, dtype)
  if adapted is not None and adapted.dora:
    node['magnitude'] = magnitude(split, path, frozen, node)
  return SplitLeaf(frozen, node, start if changed else None)


def _freeze(split: Split, path: str, leaf: Any, dtype: Any) -> Any:
  """Returns a leaf as the frozen half holds it."""
  if is_quantized(leaf):
    return leaf
  if path in split.quantized:
    roles = split.quantized[path]
    codes = quantize_leaf(leaf, roles, split.quant, path=path)
    return codes.astype(split.quant.dtype or dtype)
  return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def find_start(
  split: Split, key: jax.Array, path: str, leaf: Any = None
) -> Start:
  """Returns how the adapter of a kernel starts.

  Args:
    split: Of the tree that the kernel is in.
    key: PRNG key of the whole tree; the kernel folds in its path.
    path: The kernel's.
    leaf: The kernel; only an init that changes the base needs it.

  Raises:
    ConfigError: The init needs what is missing.
  """
  spec, adapted = split.spec, split.plan.adapted[path]
  roles = adapted.target.roles
  kernel = round_trip = None
  if spec.changes_base:
    if is_quantized(leaf):
      raise ConfigError(
        f'lora.init {spec.init!r} takes a part out of the dense kernel, but'
        f' {path!r} is quantized; pass dense params and quant=QuantSpec(…)'
      )
    kernel = to_matrices(leaf, roles)
    if path in split.quantized:
      round_trip = functools.partial(_round_trip, quant=split.quant)
  return initializers.start(
    spec.init,
    tree.fold_path(key, path),
    adapted.target.matrix,
    adapted.strength,
    kernel=kernel,
    one_hot=roles.is_embedding,
    round_trip=round_trip,
  )


def _take_out(leaf: Any, start: Start, adapted: Adapted) -> jax.Array:
  """Returns a kernel without the start of its adapter, as its model has it."""
  roles = adapted.target.roles
  _, inputs, outputs = roles.split(adapted.target.shape)
  kernel = to_matrices(leaf, roles)
  residual = initializers.take_out(kernel, start, adapted.strength)
  return from_matrices(residual, inputs, outputs, roles.order)


def _round_trip(kernel: jax.Array, quant: QuantSpec) -> jax.Array:
  codes = quantize_leaf(kernel, Roles((), ('in',), ('out',)), quant)
  return dequantize_leaf(codes, jnp.float32)


def magnitude(
  split: Split, path: str, frozen: Any, node: Mapping[str, jax.Array]
) -> jax.Array:
  """Returns the lengths of an adapted kernel's columns, which DoRA trains.

  Args:
    split: Of the tree that the kernel is in.
    path: The kernel's.
    frozen: The kernel as the frozen half has it.
    node: 'a' and 'b'.

  Returns:
    float32 [*stacked, out].
  """
  plain = dataclasses.replace(split.plan.adapted[path], dora=False)
  return _lengths(adapt(path, frozen, node, plain))


def _lengths(kernel: LoraArray) -> jax.Array:
  """Returns the lengths of the columns, a layer at a time."""
  if not kernel.stacked:
    return column_lengths(dense_matrix(kernel, jnp.float32))
  return jax.lax.map(_lengths, kernel)


def _rows(leaf: Any, rows: Rows) -> jax.Array:
  """Returns the rows that are trained, float32 [n, dim]."""
  dense = dequantize_leaf(leaf) if is_quantized(leaf) else leaf
  table = _as_float32(to_matrices(dense, rows.target.roles))
  ids = jnp.array(rows.ids)
  return table[ids] if rows.axis == 'in' else table[:, ids].T


def _as_float32(leaf: jax.Array) -> jax.Array:
  return jnp.array(leaf, jnp.float32)
