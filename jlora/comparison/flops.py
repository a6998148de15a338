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
from jlora.training.traced import count_flops


def step_flops(spec: RunSpec, config: DecoderConfig) -> int:
  """Returns the floating-point operations of one update.

  Those of its matrix products, as often as they run: what is computed again for
  the backward pass counts again. Decoding weights is no product.

  Args:
    spec: The run.
    config: The decoder's sizes.

  """
  dtype = compute_dtype(spec.train.dtype)
  lora = families.resolve(spec.lora, config)
  quant = spec.quant and families.resolve(spec.quant, config)
  params = nest(layout.shapes(config, dtype))
  frozen, trainable = partition(jax.random.key(0), params, lora, quant=quant)
  tx = make_optimizer(spec.optim, 1, trainable)
  head = layout.head_path(config)
  loss_fn = make_loss(
    Decoder(config, dtype=dtype, remat=spec.train.remat),
    lora,
    chunk=spec.train.loss_chunk,
    frozen_head=not any(
      path.startswith(f'{head}/') for path in leaves_by_path(trainable)
    ),
  )
  step = make_step(
    loss_fn,
    tx,
    make_mesh(1, devices=jax.devices()[:1]),
    accumulate=spec.train.accumulate,
  )
  return count_flops(
    jax.make_jaxpr(step)(_state(tx, trainable), frozen, _batch(spec))
  )


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
