"""The feed-forward blocks of decoders: one, or one of several experts a token.

Dimension key: N tokens, D embed, K experts a token, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jlora.models.config import DecoderConfig

ACTIVATIONS = {
  'silu': nn.silu,
  'gelu': functools.partial(nn.gelu, approximate=True),
}


class Mlp(nn.Module):
  """`down(act(gate(x)) * up(x))`; without a gate, `down(act(up(x)))`.

  References:
    Shazeer, `GLU Variants <https://arxiv.org/abs/2002.05202>`_, section 2.
  """

  config: DecoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [batch, length, embed_dim] to the same shape."""
    c = self.config
    act = ACTIVATIONS[c.activation]

    def dense(name: str, width: int, x: jax.Array) -> jax.Array:
      bias = name in c.biases
      layer = nn.Dense(width, use_bias=bias, dtype=self.dtype, name=name)
      return checkpoint_name(layer(x), 'product')

    if 'gate_up_proj' in c.fused:
      both = dense('gate_up_proj', 2 * c.mlp_dim, x)
      gate, up = jnp.split(both, 2, axis=-1)
      hidden = act(gate) * up
    elif c.gated:
      gate = dense('gate_proj', c.mlp_dim, x)
      hidden = act(gate) * dense('up_proj', c.mlp_dim, x)
    else:
      hidden = act(dense('up_proj', c.mlp_dim, x))
    return dense('down_proj', c.embed_dim, hidden)


class Experts(nn.Module):
  """Feed-forward blocks among which a router chooses for each token.

  Tokens are sorted by their experts, so that each kernel meets its own in one
  product (`jax.lax.ragged_dot`); none is dropped. XLA writes that product out
  for all experts on CPUs, and may on GPUs, at the cost of all of them. Over
  several devices each sorts and multiplies the tokens of all.

  References:
    Jiang et al., `Mixtral <https://arxiv.org/abs/2401.04088>`_, section 2.1.
  """

  config: DecoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [batch, length, embed_dim] to the same shape."""
    c = self.config
    x_ND = x.reshape(-1, c.embed_dim)
    router = nn.Dense(
      c.experts, use_bias=False, dtype=self.dtype, name='router'
    )
    # Kept with what comes of it: chosen anew from other roundings, tokens would
    # not be where their products are.
    chosen_by = checkpoint_name(router(x_ND), 'product')
    odds = jax.nn.softmax(chosen_by.astype(jnp.float32), axis=-1)
    weight_NK, expert_NK = jax.lax.top_k(odds, c.experts_per_token)
    if c.normalize_experts:
      weight_NK = weight_NK / weight_NK.sum(axis=-1, keepdims=True)
    order = jnp.argsort(expert_NK.reshape(-1))
    counts_E = jnp.bincount(expert_NK.reshape(-1), length=c.experts)
    stacks = Stacks(c, self.dtype, name='experts')
    y = stacks(x_ND[order // c.experts_per_token], counts_E)
    y_NKD = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    y_NKD = y_NKD.reshape(*weight_NK.shape, c.embed_dim)
    out = jnp.einsum(
      'NKD,NK->ND', y_NKD, weight_NK, preferred_element_type=jnp.float32
    )
    return out.astype(self.dtype).reshape(x.shape)


class Stacks(nn.Module):
  """The experts' kernels, applied to tokens that are sorted by expert."""

  config: DecoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, counts: jax.Array) -> jax.Array:
    """Maps [tokens, embed_dim] to the same shape.

    Args:
      x: Tokens of the first expert, then those of the second, and so on.
      counts: int [experts]; how many tokens each has.
    """
    c = self.config

    def dense(width: int, name: str) -> 'Stack':
      return Stack(width, c.experts, self.dtype, name=name)

    gate = dense(c.mlp_dim, 'gate_proj')(x, counts)
    up = dense(c.mlp_dim, 'up_proj')(x, counts)
    hidden = ACTIVATIONS[c.activation](gate) * up
    return dense(c.embed_dim, 'down_proj')(hidden, counts)


class Stack(nn.Module):
  """One kernel an expert, [experts, in, out].

  Attributes:
    width: Of the result.
    experts: How many.
    dtype: What is computed in.
  """

  width: int
  experts: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, counts: jax.Array) -> jax.Array:
    """Maps [tokens, in] to [tokens, width]; as in `Stacks`."""
    shape = (self.experts, x.shape[-1], self.width)
    init = nn.initializers.lecun_normal(batch_axis=0)
    kernel = self.param('kernel', init, shape)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    return checkpoint_name(jax.lax.ragged_dot(x, kernel, counts), 'product')
