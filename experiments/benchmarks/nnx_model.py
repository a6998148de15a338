"""The transformer in Flax NNX."""

import functools
from typing import Any

import jax
from flax import nnx

from experiments.benchmarks import parts


def make(sizes: parts.Sizes) -> parts.Model:
  """Returns the transformer in NNX."""
  model = nnx.eval_shape(lambda: Transformer(sizes, nnx.Rngs(0)))
  graph, state = nnx.split(model, nnx.Param)

  def apply(params: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(tokens)

  def by_hand(params: Any, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    for name in parts.KERNELS:
      setattr(model.layers, name, LoraLinear(params['layers'][name]['kernel']))
    return model(tokens)

  return parts.Model(nnx.to_pure_dict(state), apply, by_hand)


class LoraLinear(nnx.Module):
  """A linear layer with an adapter, written by hand."""

  def __init__(self, leaf: parts.Lora):
    self.leaf = nnx.Variable(leaf)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., in] to [..., out]."""
    return parts.linear(x, self.leaf.get_value())


class Layer(nnx.Module):
  """Attention, then the MLP."""

  def __init__(self, sizes: parts.Sizes, rngs: nnx.Rngs):
    for name in parts.KERNELS:
      linear = nnx.Linear(*sizes.kernel(name), use_bias=False, rngs=rngs)
      setattr(self, name, linear)
    self.norm = nnx.RMSNorm(sizes.width, rngs=rngs)
    self.norm2 = nnx.RMSNorm(sizes.width, rngs=rngs)
    self.heads = sizes.heads

  def __call__(self, h: jax.Array) -> jax.Array:
    """Maps the residual stream to the next one."""
    x = self.norm(h)
    y = parts.attend(self.q(x), self.k(x), self.v(x), self.heads)
    h = h + self.o(y)
    return h + self.down(nnx.silu(self.up(self.norm2(h))))


class Transformer(nnx.Module):
  """Logits of tokens."""

  def __init__(self, sizes: parts.Sizes, rngs: nnx.Rngs):
    make_layer = functools.partial(Layer, sizes)
    split = nnx.split_rngs(splits=sizes.layers)
    self.embed = nnx.Embed(sizes.vocab, sizes.width, rngs=rngs)
    self.layers = split(nnx.vmap(make_layer))(rngs)
    self.norm = nnx.RMSNorm(sizes.width, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps int [batch, length] to [batch, length, vocab]."""

    @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @functools.partial(nnx.remat, prevent_cse=False)
    def run(h: jax.Array, layer: Layer) -> jax.Array:
      return layer(h)

    h = run(self.embed(tokens), self.layers)
    return self.embed.attend(self.norm(h))
