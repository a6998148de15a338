"""Llama with adapters, and its update by AdamW, in plain JAX.

Trees, with the layers stacked along the first axis:

  frozen     embedding [vocab, embed], final_norm [embed],
             norms {attention, mlp: [layers, embed]},
             kernels {q, k, v, o, gate, up, down: [layers, in, out] or Packed}
  trainable  {q, …: (a [layers, in, rank], b [layers, rank, out])}
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.bare.linear import linear
from experiments.benchmarks.bare.loss import mean_cross_entropy

KERNELS = {  # where Hugging Face has them, in each layer
  'q': 'self_attn.q_proj',
  'k': 'self_attn.k_proj',
  'v': 'self_attn.v_proj',
  'o': 'self_attn.o_proj',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
}
REMAT = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the shapes of the parameters do not say.

  Attributes:
    heads: Query heads.
    kv_heads: Key and value heads.
    theta: Base of the rotary wavelengths.
    eps: Of the norms.
    scale: Of the adapters.
    remat: 'none', 'dots' or 'full'.
  """

  heads: int
  kv_heads: int
  theta: float
  eps: float
  scale: float
  remat: str


class Adam(NamedTuple):
  """Moments of the gradient, and how many updates there were."""

  count: jax.Array
  first: Any
  second: Any


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  square = jnp.mean(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(square + eps) * weight[None, None]


def _angles(length: int, width: int, theta: float) -> tuple[jax.Array, ...]:
  """Returns cosines and sines [1, length, 1, width / 2]."""
  waves = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32)[None] / width)
  angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * waves[None]
  return jnp.cos(angles)[None], jnp.sin(angles)[None]


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Returns causal attention; the heads of a group lie along the queries.

  Args:
    q: [batch, length, heads, width].
    k: [batch, length, kv_heads, width].
    v: Like `k`.
  """
  batch, length, heads, width = q.shape
  groups = heads // k.shape[2]
  k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
  q = q.transpose(0, 2, 1, 3).reshape(batch, -1, groups * length, width)
  seen = jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (groups, 1))
  scores = jnp.einsum('bkrd,bktd->bkrt', q, k) * width**-0.5
  weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e30))
  out = jnp.einsum('bkrt,bktd->bkrd', weights, v)
  out = out.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)
  return out.reshape(batch, length, heads * width)


def hidden(
  trainable: Any, frozen: Any, tokens: jax.Array, sizes: Sizes
) -> jax.Array:
  """Returns what the head reads, [batch, length, embed].

  Args:
    trainable: The adapters.
    frozen: All else.
    tokens: int [batch, length].
    sizes: Of the model.
  """
  h = frozen['embedding'][tokens]
  width = trainable['q'][1].shape[-1] // sizes.heads
  cos, sin = _angles(tokens.shape[1], width, sizes.theta)

  def layer(h: jax.Array, xs: Any) -> tuple[jax.Array, None]:
    kernels, norms, adapters = xs

    def dense(name: str, x: jax.Array) -> jax.Array:
      return linear(x, kernels[name], *adapters[name], sizes.scale)

    def split(x: jax.Array, heads: int) -> jax.Array:
      return x.reshape(*x.shape[:2], heads, width)

    x = _norm(h, norms['attention'], sizes.eps)
    q = _rotate(split(dense('q', x), sizes.heads), cos, sin)
    k = _rotate(split(dense('k', x), sizes.kv_heads), cos, sin)
    v = split(dense('v', x), sizes.kv_heads)
    h = h + dense('o', _attend(q, k, v))
    x = _norm(h, norms['mlp'], sizes.eps)
    inner = jax.nn.silu(dense('gate', x)) * dense('up', x)
    return h + dense('down', inner), None

  if sizes.remat != 'none':
    policy = REMAT[sizes.remat]
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
  h, _ = jax.lax.scan(layer, h, (frozen['kernels'], frozen['norms'], trainable))
  return _norm(h, frozen['final_norm'], sizes.eps)


def loss(
  trainable: Any, frozen: Any, batch: Mapping[str, jax.Array], sizes: Sizes
) -> jax.Array:
  """Returns the mean loss of a batch with tokens, targets and loss_mask."""
  h = hidden(trainable, frozen, batch['tokens'], sizes)
  return mean_cross_entropy(
    h.reshape(-1, h.shape[-1]),
    frozen['embedding'],
    batch['targets'].reshape(-1),
    batch['loss_mask'].reshape(-1),
  )


def start(trainable: Any) -> Adam:
  """Returns the state of AdamW before the first update."""
  zeros = jax.tree.map(jnp.zeros_like, trainable)
  return Adam(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))


def make_step(sizes: Sizes, learning_rate: float) -> Callable[..., Any]:
  """Returns the jitted update; it donates the adapters and their moments.

  Args:
    sizes: Of the model.
    learning_rate: Of AdamW, which has no weight decay here.

  Returns:
    A function of trainable, Adam, frozen and batch; it returns the first two
    anew, and the loss before the update.
  """

  def step(trainable: Any, state: Adam, frozen: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(loss)(trainable, frozen, batch, sizes)
    count = state.count + 1
    first = _mean(state.first, grads, 0.9)
    second = _mean(state.second, jax.tree.map(jnp.square, grads), 0.999)
    up, down = 1 - 0.9**count, 1 - 0.999**count

    def move(x: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
      return x - learning_rate * (m / up) / (jnp.sqrt(v / down) + 1e-8)

    trainable = jax.tree.map(move, trainable, first, second)
    return trainable, Adam(count, first, second), value

  return jax.jit(step, donate_argnums=(0, 1))


def _mean(old: Any, new: Any, decay: float) -> Any:
  """Returns the running mean of each leaf."""
  return jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, new)
