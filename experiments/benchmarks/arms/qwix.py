"""Qwix on the decoder of jlora.models, which knows nothing of either."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import traverse_util

from experiments.benchmarks.harness import training, worker
from jlora.checkpoints.bases import open_base
from jlora.models.decoder import Decoder


def run(work: Mapping[str, Any]) -> dict[str, Any]:
  """Times the step.

  Args:
    work: Fields of `training.Work`.
  """
  work = training.Work(**work)
  base = open_base(work.folder)
  model = adapted(Decoder(base.config, remat=work.remat), work)
  trainable, frozen = load(model, base.load_params(), work)
  tx = optax.adamw(training.LEARNING_RATE, weight_decay=0.0)
  state = tx.init(trainable)
  step = make_step(model, tx)
  return work.run(step, trainable, state, frozen)


def adapted(model: Decoder, work: training.Work) -> Any:
  """Returns the decoder with adapters on all linear layers.

  Args:
    model: The decoder.
    work: What the arm is asked for.
  """
  quant = {'weight_qtype': 'nf4', 'tile_size': 64} if work.quantized else {}
  provider = qwix.LoraProvider(
    module_path=r'.*_proj', rank=work.rank, alpha=work.alpha, **quant
  )
  return qwix.apply_lora_to_model(model, provider)


def load(model: Any, params: Any, work: training.Work) -> tuple[Any, Any]:
  """Returns adapters and quantized base, both as flat dicts by path.

  Args:
    model: From `adapted`.
    params: Of the decoder, dense.
    work: What the arm is asked for.
  """

  def init() -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return model.init(jax.random.key(0), tokens)['params']

  shapes = jax.eval_shape(init)
  trainable = jax.jit(lambda: _adapters(init()))()
  params = jax.tree.map(jnp.asarray, params)
  if not work.quantized:
    return trainable, traverse_util.flatten_dict(params)
  # Qwix says how to quantize one layer, and here all are stacked.
  layers = params.pop('layers')
  quantize = jax.vmap(
    lambda layer: qwix.quantize_params(layer, _of_one(shapes['layers']))
  )
  frozen = {**params, 'layers': jax.jit(quantize)(layers)}
  return trainable, traverse_util.flatten_dict(frozen)


def _of_one(shapes: Any) -> Any:
  """Returns the shapes of one layer of a stack."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes
  )


def _adapters(params: Any) -> dict[tuple[str, ...], jax.Array]:
  flat = traverse_util.flatten_dict(params)
  ends = ('_lora_a', '_lora_b')
  return {path: x for path, x in flat.items() if path[-1].endswith(ends)}


def make_step(model: Any, tx: optax.GradientTransformation) -> Any:
  """Returns the jitted update, with optax's loss over all logits.

  Args:
    model: From `adapted`.
    tx: Over the adapters.
  """

  def loss_fn(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
    mask = batch['loss_mask']
    params = traverse_util.unflatten_dict({**frozen, **trainable})
    logits = model.apply({'params': params}, batch['tokens'])
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['targets']
    )
    return jnp.sum(losses * mask) / mask.sum()

  def step(trainable: Any, state: Any, frozen: Any, batch: Any) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, batch)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, loss

  return jax.jit(step, donate_argnums=(0, 1))


if __name__ == '__main__':
  worker.serve(run)
