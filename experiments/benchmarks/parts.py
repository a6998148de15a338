"""What the three models share, and a LoRA product written by hand.

All three are one transformer: causal attention without positions, an MLP of
two kernels, root mean square norms, and a head that is the embedding. The
layers are stacked, scanned over and rematerialized.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora

KERNELS = ('q', 'k', 'v', 'o', 'up', 'down')  # of each layer
AXES = (('layers/.*/kernel', 'layers | in -> out'),)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a transformer and of its batch.

  Attributes:
    layers: Number of layers.
    width: Of the residual stream.
    mlp: Of the hidden layer.
    heads: Of the attention; a divisor of `width`.
    vocab: Number of tokens there are.
    batch: Sequences.
    length: Tokens in each.
  """

  layers: int = 8
  width: int = 512
  mlp: int = 1408
  heads: int = 8
  vocab: int = 4096
  batch: int = 2
  length: int = 256

  def kernel(self, name: str) -> tuple[int, int]:
    """Returns the input and output size of one of `KERNELS`."""
    wide = {'up': (self.width, self.mlp), 'down': (self.mlp, self.width)}
    return wide.get(name, (self.width, self.width))


@dataclasses.dataclass(frozen=True)
class Model:
  """A transformer, and the same with LoRA written into it.

  Attributes:
    params: Shapes of the parameters; kernels are at `layers/NAME/kernel`.
    apply: Logits [batch, length, vocab] of parameters and tokens.
    by_hand: Likewise, of parameters with a `Lora` in the place of each kernel.
  """

  params: Any
  apply: Callable[[Any, jax.Array], jax.Array]
  by_hand: Callable[[Any, jax.Array], jax.Array]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
  """Returns causal attention; all are [batch, length, width]."""
  q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
  y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  return y.reshape(*y.shape[:2], -1)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the mean loss of the next tokens."""
  log_probs = jax.nn.log_softmax(logits[:, :-1])
  chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)
  return -jnp.mean(chosen)


class Lora(NamedTuple):
  """A kernel and its adapter, as code written by hand has them.

  Attributes:
    kernel: [..., in, out], dense or quantized.
    a: [..., in, rank].
    b: [..., rank, out].
  """

  kernel: jax.Array | jlora.QuantizedArray
  a: jax.Array
  b: jax.Array


def with_lora(frozen: Any, trainable: Any) -> Any:
  """Returns the parameters with a `Lora` in the place of each kernel."""
  layers = dict(frozen['layers'])
  for name in KERNELS:
    adapter = trainable['layers'][name]['kernel']
    layers[name] = {'kernel': Lora(layers[name]['kernel'], **adapter)}
  return {**frozen, 'layers': layers}


SCALE = 2.0  # alpha / rank


@jax.custom_vjp
def linear(x: jax.Array, leaf: Lora) -> jax.Array:
  """Returns `x W + SCALE * (x a) b` for an unstacked kernel.

  Args:
    x: [..., in].
    leaf: The kernel is constant; a quantized one is decoded again for the
      backward pass.
  """
  return _forward(x, leaf)[0]


def _forward(x: jax.Array, leaf: Lora) -> tuple[jax.Array, Any]:
  # The barriers keep XLA from decoding a kernel before its turn, and from
  # keeping it between its two.
  rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
  low = rows @ leaf.a
  y = rows @ jlora.dequantize(leaf.kernel) + SCALE * (low @ leaf.b)
  return y.reshape(*x.shape[:-1], -1), (x, low, leaf)


def _backward(saved: Any, g: jax.Array) -> tuple[jax.Array, Lora]:
  x, low, leaf = saved
  rows, g = (v.reshape(-1, v.shape[-1]) for v in (x, g))
  g, kernel = jax.lax.optimization_barrier((g, leaf.kernel))
  low_g = SCALE * (g @ leaf.b.T)
  dx = g @ jlora.dequantize(kernel).T + low_g @ leaf.a.T
  return dx.reshape(x.shape), Lora(None, rows.T @ low_g, SCALE * (low.T @ g))


linear.defvjp(_forward, _backward)
