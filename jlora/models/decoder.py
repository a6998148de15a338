"""A decoder in plain Linen: Llama's, and those of other families by its config.

The tree of parameters, with the layers stacked along the first axis:

  embed/embedding                      [vocab, embed]
  layers/attention_norm/scale          [layers, embed]
  layers/attention/{q,k,v}_proj/kernel [layers, embed, heads * head_dim]
  layers/attention/o_proj/kernel       [layers, heads * head_dim, embed]
  layers/attention/{q,k}_norm/scale    [layers, head_dim], with qk_norm
  layers/mlp_norm/scale                [layers, embed]
  layers/mlp/{gate,up}_proj/kernel     [layers, embed, mlp]
  layers/mlp/down_proj/kernel          [layers, mlp, embed]
  final_norm/scale                     [embed]
  lm_head/kernel                       [embed, vocab], unless tied

Where the config says so:

  position_embed/embedding               [max_positions, embed]
  layers/attention/qkv_proj/kernel       [layers, embed, all of q, k, v]
  layers/mlp/gate_up_proj/kernel         [layers, embed, 2 * mlp]
  layers/post_{attention,mlp}_norm/scale [layers, embed]
  layers/mlp/router/kernel               [layers, embed, experts]
  layers/mlp/experts/up_proj/kernel      [layers, experts, embed, mlp], likewise
                                         gate_proj and down_proj

A linear layer that adds a bias has it beside its kernel, [layers, out], and so
has LayerNorm beside its scale.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models.attention import Attention, Cache
from jlora.models.blockwise import KEPT, attend_blockwise
from jlora.models.config import DecoderConfig
from jlora.models.mlp import Experts, Mlp
from jlora.models.norms import make_norm
from jlora.models.reach import ByReach, Kinds, kinds_of, masks_of, turns_of
from jlora.models.scores import capped

_policies = jax.checkpoint_policies
# What a rematerialized layer keeps for its backward pass beside its input. The
# names are those that linear layers and attention give to what they return, and
# lifted products to what adapters need. Products without a name are parts of
# these: kept too, each would be there twice.
REMAT = {
  'full': _policies.nothing_saveable,
  'dots': _policies.save_only_these_names('product', 'adapter', KEPT),
}


class Layer(nn.Module):
  """One decoder layer: attention, then the feed-forward block."""

  config: DecoderConfig
  dtype: jnp.dtype
  attend: Any

  @nn.compact
  def __call__(
    self,
    h: jax.Array,
    turns: ByReach | None,
    seen: ByReach | jax.Array | None,
    index: jax.Array | None,
    kinds: Kinds,
    cache: Cache | None,
  ) -> tuple[jax.Array, Cache | None]:
    """Maps the residual stream [batch, length, embed_dim] to the next one."""

    c = self.config

    def norm(name: str, x: jax.Array) -> jax.Array:
      return make_norm(c, self.dtype, name)(x)

    attention = Attention(c, self.dtype, self.attend, name='attention')
    out, cache = attention(
      norm('attention_norm', h), turns, seen, kinds, cache, index
    )
    h = h + (norm('post_attention_norm', out) if c.post_norms else out)
    mlp = (Experts if c.experts else Mlp)(c, self.dtype, name='mlp')
    out = mlp(norm('mlp_norm', h))
    h = h + (norm('post_mlp_norm', out) if c.post_norms else out)
    return h, cache


class Decoder(nn.Module):
  """A decoder-only language model.

  Attributes:
    config: Sizes and constants.
    dtype: What is computed in; parameters keep their own dtype.
    remat: 'none' keeps every activation for the backward pass, 'full' a
      layer's input only, 'dots' the results of its linear layers and of
      attention too.
    unroll: Layers a step of the scan over layers takes.
    attend: How whole sequences are attended to; another is made by
      `kernels.make_attend`.
  """

  config: DecoderConfig
  dtype: Any = jnp.float32
  remat: str = 'none'
  unroll: int = 1
  attend: Any = attend_blockwise

  def setup(self) -> None:
    """Builds the parts; `hidden` and `logits` share the embedding."""
    c = self.config
    layer = Layer
    if self.remat != 'none':
      layer = nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=False)
    self.embed = nn.Embed(c.vocab_size, c.embed_dim, dtype=self.dtype)
    if c.learned_positions:
      self.position_embed = nn.Embed(
        c.max_positions, c.embed_dim, dtype=self.dtype
      )
    self.layers = nn.scan(
      layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
      length=c.layers,
      unroll=self.unroll,
    )(c, self.dtype, self.attend)
    self.final_norm = make_norm(c, self.dtype)
    if not c.tie_embeddings:
      self.lm_head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the logits [batch, length, vocab]; arguments as in `hidden`."""
    return self.logits(self.hidden(tokens, positions, segment_ids))

  def hidden(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Returns what the output head reads.

    Args:
      tokens: int [batch, length], below `vocab_size`.
      positions: int [batch, length]; None counts from zero.
      segment_ids: int [batch, length]; None is one segment.

    Returns:
      [batch, length, embed_dim] in `dtype`.
    """
    if positions is None:
      steps = jnp.arange(tokens.shape[1])[None]
      positions = jnp.broadcast_to(steps, tokens.shape)
    turns, kinds = turns_of(self.config, positions), kinds_of(self.config)
    h = self._embedded(tokens, positions)
    h, _ = self.layers(h, turns, segment_ids, None, kinds, None)
    return self.final_norm(h)

  def _embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns what the first layer reads, [batch, length, embed_dim]."""
    h = self.embed(tokens)
    if self.config.scaled_embeddings:
      # Rounded to the dtype first, as in training and in transformers.
      h = h * jnp.asarray(self.config.embed_dim**0.5, self.dtype)
    if self.config.learned_positions:
      h = h + self.position_embed(positions)
    return h

  def logits(self, h: jax.Array) -> jax.Array:
    """Maps [..., embed_dim] to [..., vocab] in `dtype`."""
    tied = self.config.tie_embeddings
    logits = self.embed.attend(h) if tied else self.lm_head(h)
    return capped(logits, self.config.logit_cap)

  def decode(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache,
    index: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Reads `tokens` behind what the cache holds.

    Args:
      tokens: int [batch, length]; length is the prompt's, then 1.
      positions: int [batch, length].
      mask: bool [batch, length, slots]; which slots each token may see, its
        own among them.
      cache: From `make_cache` or the previous call.
      index: int scalar; the slot that the first of `tokens` takes.

    Returns:
      The last token's logits [batch, vocab] and the longer cache.
    """
    seen = masks_of(self.config, mask, index)
    # One length for all tokens to come: keys are kept as they were rotated.
    turns = turns_of(self.config, positions, length=cache[0].shape[2])
    kinds = kinds_of(self.config)
    h = self._embedded(tokens, positions)
    h, cache = self.layers(h, turns, seen, index, kinds, cache)
    return self.logits(self.final_norm(h[:, -1])), cache


def make_cache(
  config: DecoderConfig, batch: int, slots: int, dtype: Any
) -> Cache:
  """Returns zeros, two of [layers, batch, slots, kv_heads, head_dim]."""
  shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
  return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
