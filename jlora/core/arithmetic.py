"""Sums of adapters, as sums of what they add to their kernels.

An adapter's update of a kernel is `s * a @ b`. Adding the `a` of two adapters,
and their `b`, would add products of one's `a` with the other's `b` too, so
factors are set side by side instead: `[a1, a2] @ [b1; b2] = a1 b1 + a2 b2`.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core import lora, targets, tree
from jlora.core.axes import Axes
from jlora.core.lora import LoraSpec
from jlora.core.targets import Target
from jlora.errors import AdapterError

Trained = tuple[Mapping[str, Any], LoraSpec]


class Update(NamedTuple):
  """What an adapter, or a sum of them, adds to one kernel: `a @ b`.

  Attributes:
    target: The kernel, and the layers of it that are changed.
    a: float32 [*stacked, in, rank].
    b: float32 [*stacked, rank, out], with weight and scale multiplied in.
  """

  target: Target
  a: jax.Array
  b: jax.Array


def add_adapters(
  params: tree.Params,
  adapters: Sequence[Trained],
  weights: Sequence[float],
  *,
  rank: int | None = None,
) -> tuple[dict[str, Any], LoraSpec]:
  """Returns one adapter whose updates are the weighted sum of others'.

  With one adapter, this scales it. Layers that none of them changes are no
  targets of the result.

  Args:
    params: The base, or its frozen half: only paths and shapes are read.
    adapters: Pairs of a trainable tree and its spec. They may differ in
      targets, ranks and scales.
    weights: One for each adapter; any sign.
    rank: Of the result. None adds the ranks up, which is exact; a number
      gives the best approximation of that rank for each layer.

  Returns:
    A trainable tree and its spec, with a scale of one.

  Raises:
    AdapterError: An adapter is more than updates `s * a @ b` of this base,
      does not fit it, or the rank exceeds what a kernel can use.

  References:
    Ilharco et al., `Task Arithmetic <https://arxiv.org/abs/2212.04089>`_; the
    two ways are 'cat' and 'svd' of `add_weighted_adapter` in PEFT.
  """
  _check_weights(adapters, weights)
  leaves = tree.leaves_by_path(params, lambda node: hasattr(node, 'shape'))
  by_path: dict[str, list[Update]] = {}
  for i, (trainable, spec) in enumerate(adapters):
    _refuse_other_changes(f'adapters[{i}]', spec)
    updates = _updates(f'adapters[{i}]', leaves, trainable, spec, weights[i])
    for path, update in updates.items():
      by_path.setdefault(path, []).append(update)
  sums = {path: _side_by_side(path, terms) for path, terms in by_path.items()}
  width = max(update.a.shape[-1] for update in sums.values())
  width = width if rank is None else rank
  spec = _spec_of(sums, [s for _, s in adapters], width)
  _check_rank(sums, spec.rank)
  if rank is not None:
    sums = {
      path: _approximate(update, spec.rank) for path, update in sums.items()
    }
  factors = {path: _pad(update, spec.rank) for path, update in sums.items()}
  return tree.nest(factors), spec


def _check_weights(
  adapters: Sequence[Trained], weights: Sequence[float]
) -> None:
  if not adapters or len(adapters) != len(weights):
    raise AdapterError(
      f'there are {len(adapters)} adapters and {len(weights)} weights; give at'
      ' least one adapter, and one weight for each'
    )
  for weight in weights:
    if not math.isfinite(weight):
      raise AdapterError(f'weight {weight} is not finite; use one such as 0.5')


def _refuse_other_changes(name: str, spec: LoraSpec) -> None:
  """Refuses an adapter whose change is not `s * a @ b` on this base."""
  if spec.variant != 'lora':
    raise AdapterError(
      f'{name} has variant {spec.variant!r}: it rescales the outputs of the sum'
      ' of kernel and update, so its change is no product to add; merge it'
      ' into the base, and train the others on that'
    )
  for field in ('train_full', 'train_rows'):
    if getattr(spec, field):
      raise AdapterError(
        f'{name} has {field}={getattr(spec, field)!r}: leaves or rows that'
        ' replace those of the base are no updates to add; merge it into the'
        ' base, and train the others on that'
      )
  if spec.changes_base:
    raise AdapterError(
      f'{name} has init {spec.init!r}: its updates belong to a base that its'
      ' own start was taken out of; export it with --to=peft, which writes'
      ' plain LoRA of twice the rank, and add what is loaded from there'
    )


def _updates(
  name: str,
  leaves: Mapping[str, Any],
  trainable: Mapping[str, Any],
  spec: LoraSpec,
  weight: float,
) -> dict[str, Update]:
  """Returns the weighted updates of one adapter by path."""
  adapted = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  factors = tree.leaves_by_path(trainable)
  found = {}
  for path, strength in lora.strengths(adapted, spec).items():
    stacked, size, out = adapted[path].matrix
    a, b = (factors.pop(f'{path}/{side}', None) for side in 'ab')
    shapes = tuple(getattr(x, 'shape', None) for x in (a, b))
    wanted = (*stacked, size, strength.rank), (*stacked, strength.rank, out)
    if shapes != wanted:
      raise AdapterError(
        f'{name} has a and b of shapes {shapes} at {path!r} (None: it is not'
        f' there), and its spec asks for {wanted}; give each adapter with the'
        ' spec it was trained with'
      )
    scales = jnp.asarray(weight * strength.scales)[..., None, None]
    found[path] = Update(adapted[path], a, scales * b)
  if factors:
    raise AdapterError(
      f'{name} has {next(iter(factors))!r}, which its spec does not train; give'
      ' each adapter with the spec it was trained with'
    )
  return found


def _side_by_side(path: str, terms: list[Update]) -> Update:
  """Returns the exact sum of updates of one kernel."""
  target = terms[0].target
  for other in terms[1:]:
    if _layout(other.target) != _layout(target):
      raise AdapterError(
        f'adapters take the axes of {path!r} as {target.roles.text!r} and as'
        f' {other.target.roles.text!r}; their updates have no common form'
      )
  chosen = np.any([term.target.chosen for term in terms], axis=0)
  a = jnp.concatenate([term.a for term in terms], axis=-1)
  b = jnp.concatenate([term.b for term in terms], axis=-2)
  return Update(Target(target.roles, target.shape, chosen), a, b)


def _layout(target: Target) -> tuple[Any, ...]:
  return target.roles.split(target.shape), target.roles.order


def _approximate(update: Update, rank: int) -> Update:
  """Returns the best approximation of that rank, without forming [in, out].

  With a = Q_a R_a and b^T = Q_b R_b, the singular values of a b are those of
  the small R_a R_b^T, and Q_a and Q_b turn its vectors into those of a b.

  Args:
    update: Of one kernel.
    rank: Of the result, which has fewer columns where the sum has.
  """
  q_a, r_a = jnp.linalg.qr(update.a)
  q_b, r_b = jnp.linalg.qr(update.b.mT)
  core = jnp.matmul(r_a, r_b.mT, precision='highest')
  u, values, vt = jnp.linalg.svd(core, full_matrices=False)
  root = jnp.sqrt(values[..., :rank])
  a = jnp.matmul(q_a, u[..., :rank], precision='highest')
  b = jnp.matmul(vt[..., :rank, :], q_b.mT, precision='highest')
  return Update(update.target, a * root[..., None, :], root[..., None] * b)


def _pad(update: Update, rank: int) -> dict[str, jax.Array]:
  """Returns the factors with zeros up to the rank that all kernels have."""
  missing = rank - update.a.shape[-1]
  kept = [(0, 0)] * (update.a.ndim - 2)
  return {
    'a': jnp.pad(update.a, (*kept, (0, 0), (0, missing))),
    'b': jnp.pad(update.b, (*kept, (0, missing), (0, 0))),
  }


def _check_rank(sums: Mapping[str, Update], rank: int) -> None:
  for path, update in sums.items():
    _, size, out = update.target.matrix
    if rank > min(size, out):
      raise AdapterError(
        f'the sum has rank {rank}, which exceeds what {path!r} of shape'
        f' {update.target.shape} can use; pass a rank of at most'
        f' {min(size, out)}'
      )


def _spec_of(
  sums: Mapping[str, Update], specs: Sequence[LoraSpec], rank: int
) -> LoraSpec:
  """Returns the spec of a sum: its layers by name, and a scale of one."""
  axes: Axes = specs[0].axes
  if any(spec.axes != axes for spec in specs):
    axes = tuple((re.escape(p), u.target.roles.text) for p, u in sums.items())
  names = [name for path, u in sums.items() for name in _names(path, u.target)]
  return LoraSpec(
    rank=rank,
    alpha=float(rank),
    targets=tuple(map(re.escape, names)),
    axes=axes,
  )


def _names(path: str, target: Target) -> list[str]:
  """Returns the kernel's path, or those of the layers that are changed."""
  if target.chosen.all():
    return [path]
  layers = targets.layer_paths(path, target.roles, target.shape)
  return list(itertools.compress(layers, target.chosen.flat))
