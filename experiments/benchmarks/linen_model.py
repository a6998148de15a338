"""The transformer in Flax Linen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.benchmarks import parts


def make(sizes: parts.Sizes) -> parts.Model:
  """Returns the transformer in Linen."""
  model = Transformer(sizes, functools.partial(nn.Dense, use_bias=False))
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  by_hand = Transformer(sizes, LoraDense)

  def run(model: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    return model.apply({'params': params}, tokens)

  return parts.Model(
    params, functools.partial(run, model), functools.partial(run, by_hand)
  )


class LoraDense(nn.Module):
  """A linear layer with an adapter, written by hand.

  Attributes:
    features: Size of the output.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., in] to [..., features]."""
    return parts.linear(x, self.get_variable('params', 'kernel'))


class Layer(nn.Module):
  """Attention, then the MLP.

  Attributes:
    sizes: Of the model.
    dense: Makes a linear layer.
  """

  sizes: parts.Sizes
  dense: Any

  @nn.compact
  def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Maps the residual stream to the next one."""
    dense = {
      name: self.dense(self.sizes.kernel(name)[1], name=name)
      for name in parts.KERNELS
    }
    x = nn.RMSNorm()(h)
    q, k, v = (dense[name](x) for name in 'qkv')
    h = h + dense['o'](parts.attend(q, k, v, self.sizes.heads))
    x = nn.RMSNorm()(h)
    return h + dense['down'](nn.silu(dense['up'](x))), None


class Transformer(nn.Module):
  """Logits of tokens.

  Attributes:
    sizes: Of the model.
    dense: Makes a linear layer.
  """

  sizes: parts.Sizes
  dense: Any

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps int [batch, length] to [batch, length, vocab]."""
    embed = nn.Embed(self.sizes.vocab, self.sizes.width)
    layers = nn.scan(
      nn.remat(Layer, prevent_cse=False),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.sizes.layers,
    )(self.sizes, self.dense, name='layers')
    h, _ = layers(embed(tokens), None)
    return embed.attend(nn.RMSNorm()(h))
