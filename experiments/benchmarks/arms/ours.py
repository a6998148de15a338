"""jlora: the program that `python -m jlora.train` compiles and runs."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.harness import training, worker
from jlora import config
from jlora.checkpoints.bases import open_base
from jlora.data.batch import Batch
from jlora.parallel.devices import compute_dtype
from jlora.parallel.mesh import by_example, make_mesh
from jlora.training.halves import abstract_halves, load_halves
from jlora.training.program import abstract_batch, make_program
from jlora.training.requirements import resolve
from jlora.training.run_spec import RunSpec


def run(work: Mapping[str, Any]) -> dict[str, Any]:
  """Times the step, built in the order of `jlora.training.job.build`.

  Args:
    work: Fields of `training.Work`.
  """
  work = training.Work(**work)
  mesh = make_mesh(devices=jax.devices()[:1])
  base = open_base(work.folder)
  spec = resolve(make_spec(work), base.config)
  dtype = compute_dtype(spec.train.dtype)
  shapes = abstract_halves(spec, base.config, dtype, mesh, work.steps + 1)
  program = make_program(spec, base.config, shapes, mesh)
  args = (shapes.state, shapes.frozen, abstract_batch(spec, mesh))
  compiled, figures = training.compile_step(program.step, *args)
  halves = load_halves(spec, base, shapes, None)
  frozen, state = halves.frozen, halves.state
  del halves  # the state is donated
  placed = by_example(mesh)
  batches = work.batches()

  def advance(number: int) -> float:
    nonlocal state
    batch = jax.device_put(make_batch(batches[number]), placed)
    state, metrics = compiled(state, frozen, batch)
    jax.block_until_ready(state)
    return float(metrics['loss'])

  figures |= work.timed(advance, batches)
  figures['peak_bytes'] = worker.peak_bytes()
  return {**figures, **training.count_flops(program.step, *args)}


def make_spec(work: training.Work) -> RunSpec:
  """Returns the run: AdamW with a constant rate, and no clipping.

  Args:
    work: What the arm is asked for.
  """
  return config.resolve(make_config(work))


def make_config(work: training.Work) -> Any:
  """Returns the config of `make_spec`.

  Args:
    work: What the arm is asked for.
  """
  c = config.default_config()
  c.base = work.folder
  if work.quantized:
    c.quant = config.default_quant()
  with c.unlocked():
    c.lora.rank = work.rank
    c.lora.alpha = work.alpha
    c.lora.targets = 'all-linear'
    c.data.train = 'reasoning_gym:gcd'  # not read: the batches are ours
    c.data.train_examples = 1
    c.data.max_length = work.length
    c.train.batch_size = work.batch
    c.train.steps = work.steps + 1
    c.train.remat = work.remat
    c.optim.learning_rate = training.LEARNING_RATE
    c.optim.schedule = 'constant'
    c.optim.clip = 0.0
  return c


def make_batch(fields: training.Fields) -> Batch:
  """Returns a batch; where no segments are given, each row is one.

  Args:
    fields: From `training.Work.batches`.
  """
  tokens = fields['tokens']
  rows, length = tokens.shape
  steps = np.arange(length, dtype=np.int32)
  whole = {
    'segment_ids': np.ones_like(tokens),
    'positions': np.tile(steps, (rows, 1)),
  }
  return Batch(**{**whole, **fields})


if __name__ == '__main__':
  worker.serve(run)
