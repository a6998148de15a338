"""Floating-point operations of a training step, counted without running it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.partition import partition
from jlora.core.state import TrainState
from jlora.core.tree import leaves_by_path, nest
from jlora.data.batch import Batch
from jlora.models import families, layout
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.parallel.devices import compute_dtype
from jlora.parallel.mesh import make_mesh
from jlora.training.optimizers import make_optimizer
from jlora.training.run_spec import RunSpec
from jlora.training.step import make_loss, make_step


def step_flops(spec: RunSpec, config: DecoderConfig) -> float | None:
  """Returns the floating-point operations of one update.

  XLA counts the body of a loop once, however often it runs. So the step is
  lowered again without loops: layers unrolled, the cross-entropy in one chunk
  and no microbatches, on shapes alone. The count is that of the program as it
  is lowered, recomputation for the backward pass included; compiled, an
  unrolled program would share what a loop computes twice.

  Args:
    spec: The run.
    config: The decoder's sizes.

  Returns:
    The count, or None where the backend does not count.
  """
  dtype = compute_dtype(spec.train.dtype)
  lora = families.resolve(spec.lora, config)
  quant = spec.quant and families.resolve(spec.quant, config)
  params = nest(layout.shapes(config, dtype))
  frozen, trainable = partition(jax.random.key(0), params, lora, quant=quant)
  tx = make_optimizer(spec.optim, 1, trainable)
  head = layout.head_path(config)
  loss_fn = make_loss(
    Decoder(config, dtype=dtype, remat=spec.train.remat, unroll=config.layers),
    lora,
    chunk=spec.train.batch_size * spec.data.max_length,
    frozen_head=not any(
      path.startswith(f'{head}/') for path in leaves_by_path(trainable)
    ),
  )
  step = make_step(loss_fn, tx, make_mesh(1, devices=jax.devices()[:1]))
  lowered = step.lower(_state(tx, trainable), frozen, _batch(spec))
  return (lowered.cost_analysis() or {}).get('flops')


def _state(tx: Any, trainable: Any) -> TrainState:
  """Returns the shapes of the state before the first step."""
  opt_state = jax.eval_shape(tx.init, trainable)
  step = jax.ShapeDtypeStruct((), jnp.int32)
  return TrainState(step, trainable, opt_state)


def _batch(spec: RunSpec) -> Batch:
  """Returns the shapes of a batch."""
  shape = (spec.train.batch_size, spec.data.max_length)
  return Batch(
    **{
      field.name: jax.ShapeDtypeStruct(
        shape, jnp.float32 if field.name == 'loss_mask' else jnp.int32
      )
      for field in dataclasses.fields(Batch)
    }
  )
