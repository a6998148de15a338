"""Cross-entropy over a large vocabulary, without all logits at once.

Dimension key: N tokens, C tokens a chunk, D embed, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Maps params and hidden states [..., embed] to logits [..., vocab].
LogitsFn = Callable[[Any, jax.Array], jax.Array]


def summed_cross_entropy(
  logits_fn: LogitsFn,
  params: Any,
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  *,
  chunk: int,
  frozen_head: bool,
) -> jax.Array:
  """Returns the sum over tokens of `mask * -log p(target)`.

  Logits exist for `chunk` tokens at a time, in both directions, and only for
  chunks with a token that is trained: those of each row are brought together,
  so that prompts and padding cost no product with the vocabulary.

  Args:
    logits_fn: The output head.
    params: What it reads.
    hidden: [batch, length, embed].
    targets: int [batch, length].
    mask: float [batch, length], the weight of each token.
    chunk: Tokens a chunk; as many of each row, and one at least.
    frozen_head: Whether the head's parameters are constants. Its gradient is
      then not formed, and loss and input gradient come from one pass;
      otherwise chunks are rematerialized.

  Returns:
    float32 scalar.
  """
  order = jnp.argsort(mask == 0, axis=1, stable=True)
  hidden = _reorder(hidden, order)
  targets = jnp.take_along_axis(targets, order, axis=1)
  mask = jnp.take_along_axis(mask, order, axis=1)
  run = _one_pass if frozen_head else _rematerialized
  return run(logits_fn, params, *_chunks(hidden, targets, mask, chunk))


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array) -> jax.Array:
  """Returns the tokens of each row of [batch, length, …] in another order.

  Its derivative puts them back by a look-up, where that of a look-up would be
  a sum over tokens.
  """
  return jnp.take_along_axis(x, order[..., None], axis=1)


def _reorder_forward(
  x: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _reorder(x, order), order


def _reorder_backward(order: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
  return _reorder(g, jnp.argsort(order, axis=1)), None


_reorder.defvjp(_reorder_forward, _reorder_backward)


def _chunks(
  hidden: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cuts tokens into [chunks, chunk, …], with tokens of every row in each.

  So devices with rows of their own all work on a chunk. It has one token a row
  at least; what is missing in the last one is zero.
  """
  rows, length = targets.shape
  width = min(max(chunk // rows, 1), length)

  def cut(x: jax.Array) -> jax.Array:
    padding = [(0, 0), (0, -length % width)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding).reshape(rows, -1, width, *x.shape[2:])
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], rows * width, *x.shape[3:])

  return cut(hidden), cut(targets), cut(mask)


def _where_trained(
  function: Callable[..., Any], h: jax.Array, t: jax.Array, m: jax.Array
) -> Any:
  """Returns a function of a chunk, or zeros if it trains no token."""
  shapes = jax.eval_shape(function, h, t, m)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.cond(m.any(), function, lambda *chunk: zeros, h, t, m)


def _losses(logits_CV: jax.Array, targets_C: jax.Array) -> jax.Array:
  logits_CV = logits_CV.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits_CV, axis=-1) - chosen


def _rematerialized(
  logits_fn: LogitsFn,
  params: Any,
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  # Outside of the condition, or the head would be kept for each chunk.
  @jax.checkpoint
  def one(params: Any, xs: Any) -> jax.Array:
    def loss(h: jax.Array, t: jax.Array, m: jax.Array) -> jax.Array:
      return jnp.sum(m * _losses(logits_fn(params, h), t))

    return _where_trained(loss, *xs)

  def body(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
    return total + one(params, xs), None

  total, _ = jax.lax.scan(body, jnp.float32(0), (hidden, targets, mask))
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_pass(
  logits_fn: LogitsFn,
  params: Any,
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  def one(h: jax.Array, t: jax.Array, m: jax.Array) -> jax.Array:
    return jnp.sum(m * _losses(logits_fn(params, h), t))

  def run(xs: Any) -> jax.Array:
    return _where_trained(one, *xs)

  return jax.lax.map(run, (hidden, targets, mask)).sum()


def _one_pass_forward(
  logits_fn: LogitsFn,
  params: Any,
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the loss and its gradient by `hidden`, from the same logits."""

  def one(
    h: jax.Array, t: jax.Array, m: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    logits, pull = jax.vjp(functools.partial(logits_fn, params), h)
    loss, grad = _loss_and_grad(logits, t, m)
    return loss, pull(grad.astype(logits.dtype))[0]

  def run(xs: Any) -> tuple[jax.Array, jax.Array]:
    return _where_trained(one, *xs)

  losses, grads = jax.lax.map(run, (hidden, targets, mask))
  return losses.sum(), grads


def _loss_and_grad(
  logits_CV: jax.Array, targets_C: jax.Array, mask_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the summed loss and its gradient by the logits [C, V].

  One array of their size is held: exponentials and gradient take its place. So
  the target's logit is read first, which the largest then depends on; and the
  target is found by comparing, since a CPU's scatter copies. The barriers bound
  the fusions: without them XLA computes the exponentials several times over,
  and reads the target's logit when it is needed.
  """
  barrier = jax.lax.optimization_barrier
  logits_CV = barrier(logits_CV).astype(jnp.float32)
  chosen = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)
  chosen = barrier(chosen)
  top = logits_CV.max(axis=-1, keepdims=True)
  top = barrier(jnp.maximum(top, chosen))
  exp_CV = barrier(jnp.exp(logits_CV - top))
  total = exp_CV.sum(axis=-1, keepdims=True)
  loss = (jnp.log(total) + top - chosen)[:, 0]
  is_target = jnp.arange(logits_CV.shape[1])[None] == targets_C[:, None]
  grad_CV = exp_CV * (mask_C[:, None] / total)
  grad_CV -= jnp.where(is_target, mask_C[:, None], 0)
  return jnp.sum(mask_C * loss), barrier(grad_CV)


def _one_pass_backward(
  logits_fn: LogitsFn, grads: jax.Array, g: jax.Array
) -> tuple[Any, ...]:
  return None, (g * grads).astype(grads.dtype), None, None


_one_pass.defvjp(_one_pass_forward, _one_pass_backward)
