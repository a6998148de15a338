"""The floor: a step in plain JAX, written by hand for this model alone."""

from collections.abc import Mapping
from typing import Any

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
  step = model.make_step(sizes, training.LEARNING_RATE)
  return work.run(step, trainable, state, frozen)


if __name__ == '__main__':
  worker.serve(run)
