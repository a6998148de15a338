"""The two halves of the parameters, and the ways to put them together again.

`partition` splits a tree into what is frozen and what is trained; `combine`
puts both together lazily, `merge` as plain arrays.
"""

import dataclasses
import functools
import zlib
from collections.abc import Container, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core import initializers, targets, tree
from jlora.core.axes import Roles, matrix_shape
from jlora.core.lora import LoraArray, LoraSpec, densify, is_lazy
from jlora.core.quantized import QuantSpec, is_quantized, quantize
from jlora.errors import AdapterError, ConfigError


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


def _is_leaf(node: Any) -> bool:
  return is_lazy(node) or isinstance(node, Placeholder)


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
    params: Nested dict of arrays, QuantizedArrays or ShapeDtypeStructs; with
      the last, the result holds ShapeDtypeStructs too.
    spec: What is trained.
    quant: What of the frozen half is quantized; None for plain LoRA. Leaves
      that are trained whole stay as they are.

  Returns:
    `frozen`, shaped like `params` with a `Placeholder` where a leaf is trained
    whole, and `trainable`, a nested dict that holds, at the path of each
    target, `{'a': [..., in, rank], 'b': [..., rank, out]}` or `{'full': leaf}`,
    all float32. `b` is zero.

  Raises:
    ConfigError: A pattern matches nothing or the wrong kind of leaf, a rank
      exceeds its kernel, or nothing would be trained.
  """
  arrays = jax.tree.leaves(params)
  if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
    run = functools.partial(_partition, spec=spec, quant=quant)
    return jax.eval_shape(run, key, params)
  return _partition(key, params, spec, quant)


def _partition(
  key: jax.Array, params: tree.Params, spec: LoraSpec, quant: QuantSpec | None
) -> tuple[Any, dict[str, Any]]:
  leaves = tree.leaves_by_path(params, is_quantized)
  adapted, full = plan(leaves, spec)
  trainable = {
    path: _new_adapter(key, path, leaves[path], roles, spec.rank)
    for path, roles in adapted.items()
  }
  trainable |= {path: {'full': _as_float32(leaves[path])} for path in full}

  frozen = freeze(params, full)
  if quant is not None:
    frozen = quantize(frozen, quant)
  return frozen, tree.nest(trainable)


def freeze(params: tree.Params, full: Container[str]) -> Any:
  """Returns the parameters with a `Placeholder` for leaves trained whole.

  Args:
    params: Nested dict of leaves.
    full: Paths of the leaves to leave out.
  """

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    if tree.join(path) in full:
      return Placeholder(leaf.shape, jnp.dtype(leaf.dtype))
    return leaf

  return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized)


def plan(
  leaves: dict[str, Any], spec: LoraSpec
) -> tuple[dict[str, Roles], list[str]]:
  """Returns the kernels to adapt with their roles, and the leaves to train.

  Args:
    leaves: Array-like leaves keyed by path.
    spec: What is trained.

  Raises:
    ConfigError: As in `partition`.
  """
  full = tree.matching(spec.train_full, leaves)
  adapted = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  both = sorted(set(full) & set(adapted))
  if both:
    raise ConfigError(
      f'{both[0]!r} is matched by targets and by train_full; exclude it from'
      ' one of them'
    )
  if not full and not adapted:
    raise ConfigError('nothing is trained: targets and train_full are empty')
  for path, roles in adapted.items():
    _check_rank(path, leaves[path], roles, spec.rank)
  for path in full:
    if is_quantized(leaves[path]):
      raise ConfigError(
        f'{path!r} is quantized and cannot be trained whole; leave it out of'
        ' quant.targets'
      )
  return adapted, full


def _check_rank(path: str, leaf: Any, roles: Roles, rank: int) -> None:
  _, size, out = matrix_shape(leaf.shape, roles)
  if rank > min(size, out):
    raise ConfigError(
      f'lora.rank {rank} exceeds what {path!r} of shape {leaf.shape} can use;'
      f' it must be at most {min(size, out)}'
    )
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ConfigError(f'{path!r} of dtype {leaf.dtype} cannot take an adapter')


def _as_float32(leaf: jax.Array) -> jax.Array:
  return jnp.array(leaf, jnp.float32)


def _new_adapter(
  key: jax.Array, path: str, leaf: Any, roles: Roles, rank: int
) -> dict[str, jax.Array]:
  stacked, size, out = matrix_shape(leaf.shape, roles)
  a = initializers.uniform_a(fold_path(key, path), stacked, size, rank)
  return {'a': a, 'b': jnp.zeros((*stacked, rank, out), jnp.float32)}


def fold_path(key: jax.Array, path: str) -> jax.Array:
  """Returns a key for one leaf; it depends on the path alone."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def combine(
  frozen: Any,
  trainable: dict[str, Any],
  spec: LoraSpec,
  *,
  key: jax.Array | None = None,
) -> Any:
  """Returns the parameters, shaped like the original, with lazy leaves.

  Args:
    frozen: From `partition`.
    trainable: From `partition`, or what training made of it.
    spec: The one that `partition` had.
    key: PRNG key of the dropout; None for no dropout.

  Returns:
    A tree whose adapted leaves are `LoraArray`s. Code that takes plain arrays
    runs on it through `lift`.

  Raises:
    AdapterError: `trainable` has a leaf that `frozen` lacks, or lacks one.
  """
  nodes = _trainable_by_path(trainable)
  leaves = tree.leaves_by_path(frozen, _is_leaf)
  adapted = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  _check_paths(nodes, leaves, adapted)

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    name = tree.join(path)
    if name not in nodes:
      return leaf
    if isinstance(leaf, Placeholder):
      return nodes[name]['full'].astype(leaf.dtype)
    leaf_key = None
    if key is not None and spec.dropout:
      leaf_key = fold_path(key, name)
    return _adapt(leaf, nodes[name], adapted[name], spec, leaf_key)

  return jax.tree_util.tree_map_with_path(visit, frozen, is_leaf=_is_leaf)


def _trainable_by_path(trainable: dict[str, Any]) -> dict[str, dict[str, Any]]:
  nodes: dict[str, dict[str, Any]] = {}
  for path, leaf in tree.leaves_by_path(trainable).items():
    parent, _, name = path.rpartition('/')
    nodes.setdefault(parent, {})[name] = leaf
  return nodes


def _check_paths(
  nodes: Iterable[str], leaves: dict[str, Any], adapted: Iterable[str]
) -> None:
  holes = [p for p, leaf in leaves.items() if isinstance(leaf, Placeholder)]
  expected = {*holes, *adapted}
  for path in expected.difference(nodes):
    raise AdapterError(
      f'trainable lacks {path!r}, which the spec trains; was it made by'
      ' partition with this spec?'
    )
  for path in set(nodes).difference(expected):
    raise AdapterError(
      f'trainable has {path!r}, which the spec does not train in this tree'
    )


def _adapt(
  leaf: Any,
  node: dict[str, jax.Array],
  roles: Roles,
  spec: LoraSpec,
  key: jax.Array | None,
) -> LoraArray:
  stacked, inputs, outputs = roles.split(leaf.shape)
  return LoraArray(
    base=leaf,
    a=node['a'],
    b=node['b'],
    scale=jnp.full(stacked, np.float32(spec.scale)),
    key=None if key is None else jax.random.split(key, stacked),
    inputs=inputs,
    outputs=outputs,
    dropout=spec.dropout,
  )


def merge(
  frozen: Any, trainable: dict[str, Any], spec: LoraSpec, *, dtype: Any = None
) -> Any:
  """Returns the parameters as plain arrays: `W + scale * a @ b`.

  This is the definition that every faster path is tested against.

  Args:
    frozen: From `partition`.
    trainable: From `partition`, or what training made of it.
    spec: The one that `partition` had.
    dtype: Of every leaf; None keeps each leaf's own. Sums are formed in
      float32 and rounded once.
  """
  params = combine(frozen, trainable, spec)
  cast = functools.partial(densify, dtype=dtype)
  return jax.tree.map(cast, params, is_leaf=is_lazy)


def labels(trainable: dict[str, Any]) -> dict[str, Any]:
  """Returns a tree like `trainable` whose leaves say what each one is.

  Args:
    trainable: From `partition`.

  Returns:
    The tree with 'a', 'b' or 'full' as its leaves: labels for
    `optax.partition`.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: tree.join(path[-1:]), trainable
  )
