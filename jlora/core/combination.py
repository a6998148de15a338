"""The two halves of the parameters put together again.

`combine` does it lazily, for `lift`; `merge` as plain arrays.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core import tree
from jlora.core.axes import canonical_axes
from jlora.core.lazy import LoraArray, RowsArray, densify, is_lazy
from jlora.core.lora import LoraSpec
from jlora.core.plan import (
  Adapted,
  Placeholder,
  Rows,
  is_frozen_leaf,
  make_plan,
)
from jlora.core.quantized import is_quantized
from jlora.errors import AdapterError

Node = Mapping[str, jax.Array]  # what is trained of one leaf


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
    runs on it through `lift`. (Where that is forgotten, the leaf itself says
    so; Linen, which compares shapes first, raises `ScopeParamShapeError` for
    one in 4 bits.)

  Raises:
    AdapterError: `trainable` has a leaf that `frozen` lacks, or lacks one.
  """
  nodes = tree.nodes_by_path(trainable)
  plan = make_plan(tree.arrays_by_path(frozen, is_frozen_leaf), spec)
  _check_paths(nodes, plan.paths)

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    name = tree.join(path)
    if name in plan.adapted:
      leaf_key = None
      if key is not None and spec.dropout:
        leaf_key = tree.fold_path(key, name)
      adapted = plan.adapted[name]
      return adapt(name, leaf, nodes[name], adapted, spec.dropout, leaf_key)
    if name in plan.rows:
      return _with_rows(leaf, nodes[name], plan.rows[name])
    if isinstance(leaf, Placeholder):
      return nodes[name]['full'].astype(leaf.dtype)
    return leaf

  return jax.tree_util.tree_map_with_path(visit, frozen, is_leaf=is_frozen_leaf)


def _check_paths(nodes: Mapping[str, Any], expected: set[str]) -> None:
  for path in sorted(expected.difference(nodes)):
    raise AdapterError(
      f'trainable lacks {path!r}, which the spec trains; was it made by'
      ' partition with this spec?'
    )
  for path in sorted(set(nodes).difference(expected)):
    raise AdapterError(
      f'trainable has {path!r}, which the spec does not train in this tree'
    )


def adapt(
  path: str,
  leaf: Any,
  node: Node,
  adapted: Adapted,
  dropout: float = 0.0,
  key: jax.Array | None = None,
) -> LoraArray:
  """Returns the lazy leaf of one kernel with its adapter.

  Args:
    path: The kernel's, for errors.
    leaf: The kernel, dense or quantized.
    node: 'a', 'b' and, for DoRA, 'magnitude'.
    adapted: Roles, ranks and scales.
    dropout: Share of the adapter's inputs that is dropped where there is a key.
    key: PRNG key; it is split over the stacked axes.

  Raises:
    AdapterError: The adapter does not fit the kernel.
  """
  roles = adapted.target.roles
  stacked, inputs, outputs = roles.split(leaf.shape)
  _, size, out = adapted.target.matrix
  rank = adapted.strength.rank
  found = {name: array.shape for name, array in node.items()}
  expected = {'a': (*stacked, size, rank), 'b': (*stacked, rank, out)}
  if adapted.dora:
    expected['magnitude'] = (*stacked, out)
  if found != expected:
    raise AdapterError(
      f'trainable has {found} at {path!r}; kernel and rank need {expected}'
    )
  if not is_quantized(leaf):
    axes = canonical_axes(roles.order, leaf.ndim)[: len(stacked)]
    leaf = jnp.moveaxis(leaf, axes, range(len(stacked)))
  elif leaf.stacked != stacked or leaf.inputs != inputs:
    raise AdapterError(
      f'{path!r} was quantized with other axis roles than {roles.text!r}; give'
      ' LoraSpec and QuantSpec the same axes'
    )
  return LoraArray(
    base=leaf,
    a=node['a'],
    b=node['b'],
    scale=jnp.array(adapted.strength.scales),
    magnitude=node.get('magnitude'),
    key=None if key is None else jax.random.split(key, stacked),
    inputs=inputs,
    outputs=outputs,
    order=roles.order,
    dtype=jnp.dtype(leaf.dtype),
    dropout=dropout,
  )


def _with_rows(leaf: Any, node: Node, rows: Rows) -> RowsArray:
  _, inputs, outputs = rows.target.roles.split(leaf.shape)
  return RowsArray(
    base=leaf,
    rows=node['rows'],
    ids=rows.ids,
    axis=rows.axis,
    inputs=inputs,
    outputs=outputs,
    order=rows.target.roles.order,
    dtype=jnp.dtype(leaf.dtype),
  )


def merge(
  frozen: Any, trainable: dict[str, Any], spec: LoraSpec, *, dtype: Any = None
) -> Any:
  """Returns the parameters as plain arrays: `W + s * a @ b`.

  This is the definition that every faster path is tested against; for DoRA
  see `jlora.core.lazy.dense_matrix`.

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
    The tree with 'a', 'b', 'magnitude', 'full' or 'rows' as its leaves: labels
    for `optax.partition`.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: tree.join(path[-1:]), trainable
  )
