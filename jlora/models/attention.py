"""Grouped-query attention over a whole sequence or over a key-value cache.

Dimension key: B batch, S queries, T keys, H query heads, K key-value heads,
G query heads a key-value head, D head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jlora.models.blockwise import Sight
from jlora.models.config import DecoderConfig
from jlora.models.norms import make_norm
from jlora.models.reach import ByReach, Kinds, reach_of
from jlora.models.rotary import rotate
from jlora.models.scores import capped

Cache = tuple[jax.Array, jax.Array]


def attend(
  q_BSHD: jax.Array,
  k_BTKD: jax.Array,
  v_BTKD: jax.Array,
  mask_BST: jax.Array,
  *,
  scale: float | None = None,
  cap: float | None = None,
) -> jax.Array:
  """Softmax attention; the softmax is computed in float32.

  The query heads of a group are laid out along the query axis, so both
  products are plain batched matrix products over 4 axes: on CPU this is a
  quarter faster than a product over 5 axes.

  Args:
    q_BSHD: Queries.
    k_BTKD: Keys.
    v_BTKD: Values.
    mask_BST: True where a query may see a key. A query that may see none
      averages over all values: it belongs to padding and is never read.
    scale: What scores are multiplied by; None is 1 / sqrt(head_dim).
    cap: Of the scores, as in `capped`.

  Returns:
    [batch, queries, heads * head_dim] in the dtype of `q_BSHD`.
  """
  B, S, H, D = q_BSHD.shape
  K = k_BTKD.shape[2]
  G = H // K
  q_BKRD = q_BSHD.transpose(0, 2, 1, 3).reshape(B, K, G * S, D)
  k_BKTD = k_BTKD.transpose(0, 2, 1, 3)
  v_BKTD = v_BTKD.transpose(0, 2, 1, 3)
  scores = jnp.einsum('BKRD,BKTD->BKRT', q_BKRD, k_BKTD).astype(jnp.float32)
  mask_BKRT = jnp.tile(mask_BST, (1, G, 1))[:, None]
  scores = capped(scores * (D**-0.5 if scale is None else scale), cap)
  scores = jnp.where(mask_BKRT, scores, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(q_BSHD.dtype)
  out = jnp.einsum('BKRT,BKTD->BKRD', weights, v_BKTD)
  return out.reshape(B, H, S, D).transpose(0, 2, 1, 3).reshape(B, S, H * D)


def extend(cache: Cache, k: jax.Array, v: jax.Array, index: jax.Array) -> Cache:
  """Writes new keys and values [batch, new, kv_heads, head_dim] at `index`."""
  start = (0, index, 0, 0)
  write = jax.lax.dynamic_update_slice
  keys, values = cache
  return (
    write(keys, k.astype(keys.dtype), start),
    write(values, v.astype(values.dtype), start),
  )


class Attention(nn.Module):
  """Grouped-query self-attention."""

  config: DecoderConfig
  dtype: jnp.dtype
  attend: Any  # within whole sequences, as `attend_blockwise`

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    turns: ByReach | None,
    seen: ByReach | jax.Array | None,
    kinds: Kinds,
    cache: Cache | None,
    index: jax.Array | None,
  ) -> tuple[jax.Array, Cache | None]:
    """Attends within `x`, or within the cache once `x` was written to it.

    Args:
      x: [batch, length, embed_dim].
      turns: From `turns_of`.
      seen: From `masks_of` with a cache; without one, segment ids
        [batch, length], or None where all is one segment.
      kinds: Of this layer.
      cache: Keys and values [batch, slots, kv_heads, head_dim], or None.
      index: The slot at which this call's first key goes.

    Returns:
      [batch, length, embed_dim] and the cache with the new keys and values.
    """
    c = self.config
    q, k, v = self._project(x)
    if turns is not None and len(set(c.unrotated_layers)) < c.layers:
      angles = _angles_of(turns.of(kinds.local), kinds.rotated)
      q, k = rotate(q, *angles), rotate(k, *angles)
    scale = None if c.query_scalar is None else c.query_scalar**-0.5
    how = {'scale': scale, 'cap': c.attention_cap}
    if cache is None:
      sight = Sight(seen, reach_of(c, kinds.local, x.shape[1]))
      out = self.attend(q, k, v, sight, **how)
    else:
      cache = extend(cache, k, v, index)
      k, v = (part.astype(self.dtype) for part in cache)
      out = attend(q, k, v, seen.of(kinds.local), **how)
    return self._dense('o_proj', c.embed_dim, out), cache

  def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values [batch, length, heads, head_dim]."""
    c = self.config
    heads = {'q': c.heads, 'k': c.kv_heads, 'v': c.kv_heads}
    widths = [count * c.head_dim for count in heads.values()]
    if 'qkv_proj' in c.fused:
      ends = [widths[0], widths[0] + widths[1]]
      parts = jnp.split(self._dense('qkv_proj', sum(widths), x), ends, axis=-1)
    else:
      named = zip(heads, widths, strict=True)
      parts = [self._dense(f'{name}_proj', width, x) for name, width in named]
    shape = (*x.shape[:2], -1, c.head_dim)
    q, k, v = (part.reshape(shape) for part in parts)
    if c.qk_norm:
      q = make_norm(c, self.dtype, 'q_norm')(q)
      k = make_norm(c, self.dtype, 'k_norm')(k)
    return q, k, v

  def _dense(self, name: str, width: int, x: jax.Array) -> jax.Array:
    bias = name in self.config.biases
    dense = nn.Dense(width, use_bias=bias, dtype=self.dtype, name=name)
    return checkpoint_name(dense(x), 'product')


def _angles_of(
  turns: tuple[jax.Array, jax.Array], rotated: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines of a layer: one and zero if not rotated."""
  if rotated is None:
    return turns
  cos, sin = turns
  return jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0)
