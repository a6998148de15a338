"""Cross-entropy in one pass: loss and gradient from the same logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 256  # tokens whose logits exist at once


@jax.custom_vjp
def mean_cross_entropy(
  hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
  """Returns the mean loss of the tokens that `mask` counts.

  Args:
    hidden: [tokens, embed].
    embedding: [vocab, embed], the head; a constant.
    targets: int [tokens].
    mask: float [tokens].
  """
  return _forward(hidden, embedding, targets, mask)[0]


def _forward(
  hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  count = hidden.shape[0]

  def cut(x: jax.Array) -> jax.Array:
    padding = [(0, -count % CHUNK)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, CHUNK, *x.shape[1:])

  one = functools.partial(_chunk, embedding)
  losses, grads = jax.lax.map(one, (cut(hidden), cut(targets), cut(mask)))
  share = 1 / mask.sum()
  grads = grads.reshape(-1, hidden.shape[1])[:count]
  return losses.sum() * share, grads * share


def _chunk(embedding: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
  """Returns summed loss and gradient by the hidden states of a chunk."""
  hidden, targets, mask = xs
  barrier = jax.lax.optimization_barrier
  logits = barrier(hidden @ embedding.T)
  top = logits.max(axis=-1, keepdims=True)
  exp = barrier(jnp.exp(logits - top))
  total = exp.sum(axis=-1, keepdims=True)
  rows = jnp.arange(CHUNK)
  losses = (jnp.log(total) + top)[:, 0] - logits[rows, targets]
  grad = exp * (mask[:, None] / total)
  grad = barrier(grad.at[rows, targets].add(-mask))
  return jnp.sum(mask * losses), grad @ embedding


def _backward(grads: jax.Array, g: jax.Array) -> tuple[jax.Array | None, ...]:
  return g * grads, None, None, None


mean_cross_entropy.defvjp(_forward, _backward)
