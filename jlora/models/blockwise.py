"""Causal attention that never holds all scores of a sequence.

Scores are computed tile by tile, forward and again backward. Of the softmax
only the logarithm of its sum is kept, from which the weights are made anew.

Dimension key: B batch, S queries and keys of a sequence, H query heads, K
key-value heads, G query heads a key-value head, D head_dim, R queries of a tile
in all heads of a group, T keys of a tile.

References:
  Dao et al., `FlashAttention <https://arxiv.org/abs/2205.14135>`_, and Dao,
  `FlashAttention-2 <https://arxiv.org/abs/2307.08691>`_.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.models.scores import capped
from jlora.models.tiles import Tiling, make_tiling

# What the backward pass needs of the forward pass, for remat policies.
KEPT = 'attention'
_HIDDEN = -1e30  # a score that weighs nothing
_barrier = jax.lax.optimization_barrier


class Sight(NamedTuple):
  """What tokens see beside that they see no later token.

  Attributes:
    segments: int [batch, length]; tokens see those of their own segment only.
      None is one segment.
    reach: int scalar; how many tokens one sees, itself among them. None is all.
      A Python int leaves out what is beyond before anything is compiled.
  """

  segments: jax.Array | None = None
  reach: jax.Array | int | None = None


class _Form(NamedTuple):
  """What is known when the program is traced."""

  tiling: Tiling
  scale: float
  cap: float | None


def attend_blockwise(
  q_BSHD: jax.Array,
  k_BSKD: jax.Array,
  v_BSKD: jax.Array,
  sight: Sight,
  *,
  scale: float | None = None,
  cap: float | None = None,
) -> jax.Array:
  """Softmax attention within sequences; the softmax is computed in float32.

  Scratch grows as the length does, and so does what is kept for the backward
  pass: the arguments, the result and one number a query and head.

  Args:
    q_BSHD: Queries.
    k_BSKD: Keys.
    v_BSKD: Values.
    sight: What a query sees.
    scale: What scores are multiplied by; None is 1 / sqrt(head_dim).
    cap: Of the scores, as in `capped`.

  Returns:
    [batch, length, heads * head_dim] in the dtype of `q_BSHD`.
  """
  B, S, H, D = q_BSHD.shape
  K = k_BSKD.shape[2]
  segments, reach = sight
  window = reach if isinstance(reach, int) else None
  tiling = make_tiling(S, window)
  extra = tiling.length - S  # they come last, where no other token sees them
  q_BKGSD = q_BSHD.reshape(B, S, K, H // K, D).transpose(0, 2, 3, 1, 4)
  operands = [q_BKGSD, *(x.transpose(0, 2, 1, 3) for x in (k_BSKD, v_BSKD))]
  if extra:
    operands = [_padded(x, extra, x.ndim - 2) for x in operands]
    segments = None if segments is None else _padded(segments, extra, 1)
  form = _Form(tiling, D**-0.5 if scale is None else scale, cap)
  traced = None if window else reach
  out = _attend(form, *operands, segments, traced)[..., :S, :]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, S, H * D)


def _padded(x: jax.Array, count: int, axis: int) -> jax.Array:
  widths = [(0, count if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, mode='edge')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, q: Any, k: Any, v: Any, segments: Any, reach: Any):
  return _forward(form, q, k, v, segments, reach)[0]


def _forward(
  form: _Form,
  q_BKGSD: jax.Array,
  k_BKSD: jax.Array,
  v_BKSD: jax.Array,
  segments: jax.Array | None,
  reach: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Returns the result, in the shape of the queries, and what is kept."""
  tiling = form.tiling
  sight = Sight(segments, reach)

  def body(i: Any, j: Any, width: int, carry: Any) -> Any:
    """The largest score so far, the sum of weights and that of values."""
    value = _part(v_BKSD, j, width)
    scores, seen = _scores(form, q_BKGSD, k_BKSD, sight, i, j, width)
    scores = jnp.where(seen, scores, _HIDDEN)
    before = [_rows(x, i, tiling.block) for x in carry]
    top = scores.max(axis=-1, keepdims=True)
    if not tiling.unrolled:
      top = jnp.maximum(top, before[0])
    weights = _barrier(jnp.exp(scores - top))
    total = weights.sum(axis=-1, keepdims=True)
    weights = _flat(weights.astype(value.dtype))
    out = _product('BKRT,BKTD->BKRD', weights, value).reshape(before[2].shape)
    if not tiling.unrolled:
      shrink = jnp.exp(before[0] - top)
      total, out = before[1] * shrink + total, before[2] * shrink + out
    found = (top, total, out)
    return tuple(_put(x, y, i) for x, y in zip(carry, found, strict=True))

  zero = jnp.zeros((*q_BKGSD.shape[:-1], 1), jnp.float32)
  carry = (zero - jnp.inf, zero, jnp.zeros(q_BKGSD.shape, jnp.float32))
  needed = tiling.needed(segments, reach)
  top, total, out = tiling.walk(body, carry, needed, q_BKGSD)
  out = checkpoint_name((out / total).astype(q_BKGSD.dtype), KEPT)
  logsum = checkpoint_name(top + jnp.log(total), KEPT)
  return out, (q_BKGSD, k_BKSD, v_BKSD, segments, reach, out, logsum)


def _backward(
  form: _Form, kept: tuple[Any, ...], grad_BKGSD: jax.Array
) -> tuple[Any, ...]:
  """Returns the gradients by queries, keys and values."""
  q, k, v, segments, reach, out, logsum = kept
  tiling, sight = form.tiling, Sight(segments, reach)
  # What a row's gradient by its weights is, averaged with these weights.
  mean = (grad_BKGSD.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)

  def body(i: Any, j: Any, width: int, carry: Any) -> Any:
    dq, dk, dv = carry
    row = lambda x: _rows(x, i, tiling.block)  # noqa: E731
    query, grad = _flat(row(q)), _flat(row(grad_BKGSD))
    key, value = _part(k, j, width), _part(v, j, width)
    scores, seen = _scores(form, q, k, sight, i, j, width)
    weights = jnp.where(seen, jnp.exp(scores - row(logsum)), 0)
    weights = _barrier(weights)
    by_weight = _product('BKRD,BKTD->BKRT', grad, value).reshape(weights.shape)
    by_score = weights * (by_weight - row(mean)) * form.scale
    if form.cap is not None:
      by_score *= 1 - (scores / form.cap) ** 2
    by_score = _barrier(_flat(by_score.astype(query.dtype)))
    by_query = _product('BKRT,BKTD->BKRD', by_score, key)
    weights = _flat(weights.astype(query.dtype))
    return (
      _put(dq, row(dq) + by_query.reshape(row(dq).shape), i),
      _add(dk, _product('BKRT,BKRD->BKTD', by_score, query), j),
      _add(dv, _product('BKRT,BKRD->BKTD', weights, grad), j),
    )

  carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  grads = tiling.walk(body, carry, tiling.needed(segments, reach), q)
  grads = [g.astype(q.dtype) for g in grads]
  return *grads, None, None


_attend.defvjp(_forward, _backward)


def _scores(
  form: _Form,
  q_BKGSD: jax.Array,
  k_BKSD: jax.Array,
  sight: Sight,
  i: Any,
  j: Any,
  width: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns a tile's scores [B, K, G, queries, keys], and which are seen.

  Args:
    form: What is known of them.
    q_BKGSD: All queries.
    k_BKSD: All keys.
    sight: What a query sees.
    i: The tile's first query.
    j: Its first key.
    width: Its keys.
  """
  block = form.tiling.block
  query, key = _rows(q_BKGSD, i, block), _part(k_BKSD, j, width)
  scores = _product('BKRD,BKTD->BKRT', _flat(query), key)
  scores = scores.reshape(*query.shape[:-1], width) * form.scale
  distance = (i - j) + jnp.arange(block)[:, None] - jnp.arange(width)[None]
  seen = (distance >= 0)[None]
  reach = sight.reach if form.tiling.window is None else form.tiling.window
  if reach is not None:
    seen &= (distance < reach)[None]
  if sight.segments is not None:
    own = _part(sight.segments, i, block, axis=1)
    seen &= own[:, :, None] == _part(sight.segments, j, width, axis=1)[:, None]
  return capped(scores, form.cap), seen[:, None, None]


def _product(how: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(how, x, y, preferred_element_type=jnp.float32)


def _flat(x_BKGSD: jax.Array) -> jax.Array:
  """Returns [B, K, R, D]: products over four axes are faster than over five."""
  B, K, G, S, D = x_BKGSD.shape
  return x_BKGSD.reshape(B, K, G * S, D)


def _part(x: jax.Array, start: Any, size: int, axis: int = 2) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _rows(x_BKGSD: jax.Array, start: Any, size: int) -> jax.Array:
  return _part(x_BKGSD, start, size, axis=3)


def _put(x_BKGSD: jax.Array, rows: jax.Array, start: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x_BKGSD, rows, start, axis=3)


def _add(x_BKSD: jax.Array, part: jax.Array, start: Any) -> jax.Array:
  part = part + _part(x_BKSD, start, part.shape[2])
  return jax.lax.dynamic_update_slice_in_dim(x_BKSD, part, start, axis=2)
