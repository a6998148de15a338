"""The floor: a step in plain JAX, written by hand for this model alone."""

from collections.abc import Mapping
from typing import Any

import jax

from experiments.benchmarks.bare import model, weights
from experiments.benchmarks.harness import training, worker


def run(work: Mapping[str, Any]) -> dict[str, Any]:
  """Times the step.

  Args:
    work: Fields of `training.Work`.
  """
  work = training.Work(**work)
  sizes = weights.read_sizes(work.path, work.alpha / work.rank, work.remat)
  frozen = weights.read_frozen(work.path, packed=work.quantized)
  trainable = weights.make_adapters(frozen, work.rank)
  state = model.start(trainable)
  batches = work.batches()
  step = model.make_step(sizes, training.LEARNING_RATE)
  shapes = training.shapes_of((trainable, state, frozen, batches[0]))
  compiled, figures = training.compile_step(step, *shapes)

  def advance(number: int) -> float:
    nonlocal trainable, state
    batch = jax.device_put(batches[number])
    trainable, state, loss = compiled(trainable, state, frozen, batch)
    jax.block_until_ready(trainable)
    return float(loss)

  figures |= work.timed(advance, batches)
  figures['peak_bytes'] = worker.peak_bytes()
  return {**figures, **training.count_flops(step, *shapes)}


if __name__ == '__main__':
  worker.serve(run)
