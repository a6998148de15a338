"""The programs of a run, for arrays that are here and for shapes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.core.tree import leaves_by_path
from jlora.data.batch import Batch
from jlora.models import layout
from jlora.models.blockwise import attend_blockwise
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.models.kernels import make_attend
from jlora.parallel.mesh import by_example
from jlora.training.halves import Halves
from jlora.training.run_spec import RunSpec
from jlora.training.step import make_evaluation, make_loss, make_step


class Program(NamedTuple):
  """What a run computes, traced and compiled where it is first used.

  Attributes:
    step: (state, frozen, batch) -> (state, metrics); it donates the state.
    evaluate: (trainable, frozen, batch) -> (summed loss, tokens).
  """

  step: Callable[..., Any]
  evaluate: Callable[..., Any]


def make_program(
  spec: RunSpec, config: DecoderConfig, halves: Halves, mesh: Mesh
) -> Program:
  """Returns the jitted programs of a run.

  Args:
    spec: The run, resolved for its base.
    config: The base's sizes.
    halves: Its parameters, as arrays or as shapes.
    mesh: The devices; they need not be here.
  """
  of_frozen = halves.shardings.frozen(halves.frozen)
  of_state = halves.shardings.state(halves.state)
  by_kernel = spec.train.attention == 'auto'
  loss_fn = make_loss(
    Decoder(
      config,
      dtype=halves.dtype,
      remat=spec.train.remat,
      attend=make_attend(mesh) if by_kernel else attend_blockwise,
    ),
    spec.lora,
    chunk=spec.train.loss_chunk,
    frozen_head=_head_is_frozen(halves.state.trainable, config),
    gather=halves.shardings.gather,
    packed=spec.data.pack,
  )
  step = make_step(
    loss_fn,
    halves.tx,
    mesh,
    accumulate=spec.train.accumulate,
    seed=spec.seed,
    placed=(of_state, of_frozen),
  )
  placed = (of_state.trainable, of_frozen)
  return Program(step, make_evaluation(loss_fn, mesh, placed))


def _head_is_frozen(trainable: Any, config: DecoderConfig) -> bool:
  head = layout.head_path(config)
  return not any(p.startswith(f'{head}/') for p in leaves_by_path(trainable))


def abstract_batch(spec: RunSpec, mesh: Mesh) -> Batch:
  """Returns the shapes of a batch [batch_size, max_length] of a run.

  Args:
    spec: The run.
    mesh: The devices that share its rows.
  """
  shape = (spec.train.batch_size, spec.data.max_length)
  placed = by_example(mesh)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)
  mask = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)
  return Batch(ids, ids, mask, ids, ids)
