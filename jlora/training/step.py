"""One update of the trained parameters, and the loss it descends."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jlora.core.combination import combine
from jlora.core.lift import Gather, lift
from jlora.core.lora import LoraSpec
from jlora.core.state import TrainState
from jlora.data.batch import Batch
from jlora.parallel.mesh import by_example, replicated
from jlora.parallel.shardings import is_on_host, on_device
from jlora.training.losses import summed_cross_entropy

# (trainable, frozen, batch, dropout key or None) -> (summed loss, tokens)
LossFn = Callable[[Any, Any, Batch, jax.Array | None], tuple[Any, Any]]


def make_loss(
  model: Any,
  spec: LoraSpec,
  *,
  chunk: int,
  frozen_head: bool,
  gather: Gather | None = None,
  packed: bool = True,
) -> LossFn:
  """Returns the summed loss of a batch, as a function of both halves.

  Args:
    model: A Linen module with the methods `hidden` and `logits`.
    spec: What is trained.
    chunk: Tokens whose logits exist at once.
    frozen_head: Whether the leaf that makes logits is a constant.
    gather: As in `jlora.lift`.
    packed: Whether a row may hold several examples. Of one, no token sees the
      padding behind it.
  """
  apply = lift(model.apply, gather=gather)

  def logits_fn(params: Any, h: jax.Array) -> jax.Array:
    return apply({'params': params}, h, method='logits')

  def loss_fn(
    trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    params = combine(frozen, trainable, spec, key=key)
    hidden = apply(
      {'params': params},
      batch.tokens,
      batch.positions,
      batch.segment_ids if packed else None,
      method='hidden',
    )
    loss = summed_cross_entropy(
      logits_fn,
      params,
      hidden,
      batch.targets,
      batch.loss_mask,
      chunk=chunk,
      frozen_head=frozen_head,
    )
    return loss, batch.loss_mask.sum()

  return loss_fn


def make_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  *,
  accumulate: int = 1,
  seed: int = 0,
  placed: tuple[Any, Any] | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]:
  """Returns the jitted training step; its first argument is donated.

  An update whose gradient is not finite is not applied: the state comes back
  as it was, but for the step count.
  Put the first state where it belongs (`jax.device_put`): a state from
  elsewhere is traced, and compiled, once more.

  Args:
    loss_fn: From `make_loss`.
    tx: The optimizer, over the trainable tree.
    mesh: Devices; the batch is split over 'data' and 'fsdp'.
    accumulate: Microbatches a batch is cut into; gradients are summed over
      tokens, so the result does not depend on it.
    seed: Of the dropout.
    placed: Shardings of the state and of the frozen parameters; None for all
      of them whole on every device.

  Returns:
    A function of state, frozen parameters and batch. It returns the next
    state and `loss` (mean over trained tokens), `tokens`, `grad_norm` and
    `finite`.
  """
  everywhere = replicated(mesh)
  of_state, of_frozen = placed or (everywhere, everywhere)

  def step(
    state: TrainState, frozen: Any, batch: Batch
  ) -> tuple[TrainState, dict[str, Any]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    loss, tokens, grads = _gradients(
      loss_fn, state.trainable, frozen, batch, key, accumulate
    )
    share = 1 / jnp.maximum(tokens, 1)
    grads = jax.tree.map(lambda g: g * share, grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    state = _on_devices(state, of_state)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    new = dataclasses.replace(state, trainable=trainable, opt_state=opt_state)
    new = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, state)
    new = dataclasses.replace(new, step=state.step + 1)
    metrics = {
      'loss': loss * share,
      'tokens': tokens,
      'grad_norm': norm,
      'finite': finite,
    }
    return new, metrics

  return jax.jit(
    step,
    in_shardings=(of_state, of_frozen, by_example(mesh)),
    out_shardings=(of_state, everywhere),
    donate_argnums=0,
  )


def _on_devices(state: TrainState, placed: Any) -> TrainState:
  """Brings to the devices what a state has in their hosts' memory."""
  if not is_on_host(placed):
    return state
  opt_state = jax.device_put(state.opt_state, on_device(placed.opt_state))
  return dataclasses.replace(state, opt_state=opt_state)


def _gradients(
  loss_fn: LossFn,
  trainable: Any,
  frozen: Any,
  batch: Batch,
  key: jax.Array,
  accumulate: int,
) -> tuple[jax.Array, jax.Array, Any]:
  """Returns summed loss, tokens and summed gradients over microbatches."""
  compute = jax.value_and_grad(loss_fn, has_aux=True)
  if accumulate == 1:
    (loss, tokens), grads = compute(trainable, frozen, batch, key)
    return loss, tokens, grads

  def cut(x: jax.Array) -> jax.Array:
    # Every device keeps rows of its own in each microbatch.
    rows = x.reshape(-1, accumulate, *x.shape[1:])
    return rows.swapaxes(0, 1)

  def body(total: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
    microbatch, microkey = xs
    (loss, tokens), grads = compute(trainable, frozen, microbatch, microkey)
    return jax.tree.map(jnp.add, total, (loss, tokens, grads)), None

  zeros = jax.tree.map(jnp.zeros_like, trainable)
  start = (jnp.float32(0), jnp.float32(0), zeros)
  xs = (jax.tree.map(cut, batch), jax.random.split(key, accumulate))
  (loss, tokens, grads), _ = jax.lax.scan(body, start, xs)
  return loss, tokens, grads


def make_evaluation(
  loss_fn: LossFn, mesh: Mesh, placed: tuple[Any, Any] | None = None
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
  """Returns the jitted summed loss and token count, without dropout.

  Args:
    loss_fn: From `make_loss`.
    mesh: As in `make_step`.
    placed: Shardings of the trainable and of the frozen parameters; None for
      all of them whole on every device.

  Returns:
    A function of trainable, frozen and batch.
  """
  everywhere = replicated(mesh)
  return jax.jit(
    lambda trainable, frozen, batch: loss_fn(trainable, frozen, batch, None),
    in_shardings=(*(placed or (everywhere, everywhere)), by_example(mesh)),
    out_shardings=everywhere,
  )
