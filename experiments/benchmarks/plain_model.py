"""The transformer as a function of a dict of arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import parts


def make(sizes: parts.Sizes) -> parts.Model:
  """Returns the transformer in plain JAX."""

  def zeros(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  layers = {
    name: {'kernel': zeros(sizes.layers, *sizes.kernel(name))}
    for name in parts.KERNELS
  }
  norms = {name: zeros(sizes.layers, sizes.width) for name in ('norm', 'norm2')}
  params = {
    'embedding': zeros(sizes.vocab, sizes.width),
    'layers': {**layers, **norms},
    'norm': zeros(sizes.width),
  }
  run = functools.partial(_logits, sizes.heads)
  return parts.Model(
    params,
    functools.partial(run, jnp.matmul),
    functools.partial(run, parts.linear),
  )


Product = Callable[[jax.Array, Any], jax.Array]


def _logits(
  heads: int, product: Product, params: Any, tokens: jax.Array
) -> jax.Array:

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def layer(h: jax.Array, p: Any) -> tuple[jax.Array, None]:
    x = _normalized(h, p['norm'])
    q, k, v = (product(x, p[name]['kernel']) for name in 'qkv')
    h = h + product(parts.attend(q, k, v, heads), p['o']['kernel'])
    x = _normalized(h, p['norm2'])
    x = jax.nn.silu(product(x, p['up']['kernel']))
    return h + product(x, p['down']['kernel']), None

  h, _ = jax.lax.scan(layer, params['embedding'][tokens], params['layers'])
  return _normalized(h, params['norm']) @ params['embedding'].T


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean + 1e-6) * jnp.broadcast_to(scale, x.shape)
