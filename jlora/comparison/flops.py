"""Floating-point operations of a training step, counted without running it."""

import jax

from jlora.models.config import DecoderConfig
from jlora.parallel.devices import compute_dtype
from jlora.parallel.mesh import make_mesh
from jlora.training.halves import abstract_halves
from jlora.training.program import abstract_batch, make_program
from jlora.training.requirements import resolve
from jlora.training.run_spec import RunSpec
from jlora.training.traced import count_flops


def step_flops(spec: RunSpec, config: DecoderConfig) -> int:
  """Returns the floating-point operations of one update on one device.

  Those of its matrix products, as often as they run: what is computed again for
  the backward pass counts again. Decoding weights is no product.

  Args:
    spec: The run.
    config: The decoder's sizes.
  """
  mesh = make_mesh(1, devices=jax.devices()[:1])
  spec = resolve(spec, config)
  dtype = compute_dtype(spec.train.dtype)
  halves = abstract_halves(spec, config, dtype, mesh, 1)
  step = make_program(spec, config, halves, mesh).step
  batch = abstract_batch(spec, mesh)
  return count_flops(step.trace(halves.state, halves.frozen, batch).jaxpr)
