"""Grouped-query attention over a whole sequence or over a key-value cache.

Dimension key: B batch, S queries, T keys, H query heads, K key-value heads,
G query heads a key-value head, D head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models.config import DecoderConfig
from jlora.models.rotary import rotate

Cache = tuple[jax.Array, jax.Array]


class Kinds(NamedTuple):
  """What differs from layer to layer; None where nothing does.

  Attributes:
    local: bool [layers], or of one layer: which see a window only.
    rotated: Likewise, which have rotary embeddings.
  """

  local: jax.Array | None
  rotated: jax.Array | None


class Seen(NamedTuple):
  """Which keys a query may see, bool [batch, queries, keys].

  Attributes:
    everywhere: In layers that see the whole sequence; None where none does.
    nearby: In those that see a window only; None where none does.
  """

  everywhere: jax.Array | None
  nearby: jax.Array | None

  def of(self, local: jax.Array | None) -> jax.Array:
    """Returns the mask of one layer.

    Args:
      local: From `Kinds`, of the layer.
    """
    if local is None:
      return self.nearby if self.everywhere is None else self.everywhere
    return jnp.where(local, self.nearby, self.everywhere)


def kinds_of(config: DecoderConfig) -> Kinds:
  """Returns what differs between the layers of a decoder."""

  def mixed(chosen: tuple[int, ...], value: bool) -> jax.Array | None:
    if len(set(chosen)) in (0, config.layers):
      return None
    flags = jnp.full(config.layers, not value)
    return flags.at[jnp.array(chosen)].set(value)

  return Kinds(
    mixed(config.local_layers, True), mixed(config.unrotated_layers, False)
  )


def masks_of(
  config: DecoderConfig, mask: jax.Array, start: jax.Array | int = 0
) -> Seen:
  """Returns the masks of all kinds of layers.

  Args:
    config: The decoder's.
    mask: bool [batch, queries, keys], of a layer that sees everything.
    start: int scalar; the place of the first query among the keys.
  """
  if not config.local_layers:
    return Seen(mask, None)
  queries, keys = mask.shape[1:]
  places = start + jnp.arange(queries)
  distance = places[:, None] - jnp.arange(keys)[None]
  nearby = mask & (distance < config.sliding_window)[None]
  every = len(set(config.local_layers)) == config.layers
  return Seen(None if every else mask, nearby)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
  """Returns which keys a query may see in packed sequences.

  Args:
    segment_ids: int [batch, length]; tokens see earlier tokens of their own
      segment only.

  Returns:
    bool [batch, length (queries), length (keys)].
  """
  length = segment_ids.shape[1]
  earlier = jnp.tril(jnp.ones((length, length), bool))
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return jnp.logical_and(same, earlier[None])


def attend(
  q_BSHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, mask_BST: jax.Array
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
  scores = jnp.where(mask_BKRT, scores * D**-0.5, -1e30)
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
  """Grouped-query self-attention with rotary positions."""

  config: DecoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    seen: Seen,
    kinds: Kinds,
    cache: Cache | None,
    index: jax.Array | None,
  ) -> tuple[jax.Array, Cache | None]:
    """Attends within `x`, or within the cache once `x` was written to it.

    Args:
      x: [batch, length, embed_dim].
      rotary: From `rotary.angles`.
      seen: From `masks_of`.
      kinds: Of this layer.
      cache: Keys and values [batch, slots, kv_heads, head_dim], or None.
      index: The slot at which this call's first key goes.

    Returns:
      [batch, length, embed_dim] and the cache with the new keys and values.
    """
    c = self.config

    def dense(name: str, width: int) -> nn.Dense:
      bias = name in c.biases
      return nn.Dense(width, use_bias=bias, dtype=self.dtype, name=name)

    def project(name: str, heads: int) -> jax.Array:
      y = dense(f'{name}_proj', heads * c.head_dim)(x)
      y = y.reshape(*x.shape[:2], heads, c.head_dim)
      if not c.qk_norm or name == 'v':
        return y
      norm = nn.RMSNorm(
        epsilon=c.norm_eps, dtype=self.dtype, name=f'{name}_norm'
      )
      return norm(y)

    q, k, v = (
      project('q', c.heads),
      project('k', c.kv_heads),
      project('v', c.kv_heads),
    )
    if len(set(c.unrotated_layers)) < c.layers:
      angles = _angles_of(rotary, kinds.rotated)
      q, k = rotate(q, *angles), rotate(k, *angles)
    if cache is not None:
      cache = extend(cache, k, v, index)
      k, v = (part.astype(self.dtype) for part in cache)
    out = attend(q, k, v, seen.of(kinds.local))
    return dense('o_proj', c.embed_dim)(out), cache


def _angles_of(
  rotary: tuple[jax.Array, jax.Array], rotated: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines of a layer: one and zero if not rotated."""
  if rotated is None:
    return rotary
  cos, sin = rotary
  return jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0)
