r"""What the train loop costs beside the programs that it runs.

  python -m experiments.benchmarks.loop --config=experiments/qlora.py \
    --config.train.steps=12 --config.eval.every=6 --out=loop.json

Two arms in turns, from the same state: the loop (batches, metrics.jsonl, best
adapter, held-out loss), and the compiled step and evaluation called back to
back on batches that are there already. What the loop takes more is its
overhead; the checkpoint at its end is told apart. The README has results.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from jlora import config, door
from jlora.checkpoints.run_folder import RunFolder
from jlora.checkpoints.runs import RunCheckpoints
from jlora.training.job import Job, build
from jlora.training.loop import advance
from jlora.training.profiling import Trace
from jlora.training.progress import Progress

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each arm runs.')
_OUT = flags.DEFINE_string('out', None, 'File for the result as JSON.')


class TimedCheckpoints(RunCheckpoints):
  """Checkpoints that know how long saving took.

  Attributes:
    seconds: Of all saves.
  """

  seconds = 0.0

  def save(self, state: Any, record: dict[str, Any]) -> None:
    """Saves and counts the time."""
    began = time.perf_counter()
    super().save(state, record)
    self.seconds += time.perf_counter() - began


def loop_seconds(job: Job, console: Console) -> tuple[float, float]:
  """Runs the loop over all steps of a run.

  Args:
    job: The run.
    console: Where progress goes.

  Returns:
    Seconds without and of checkpoints.
  """
  with (
    tempfile.TemporaryDirectory() as root,
    RunFolder(root) as folder,
    TimedCheckpoints(folder.path('checkpoints')) as saved,
  ):
    metrics = folder.metrics(up_to=-1)
    progress = Progress(jax.tree.map(jnp.copy, job.state), {}, [], 0.0)
    trace = Trace(None, 0, job.steps, console.print)
    began = time.perf_counter()
    if not advance(job, folder, saved, progress, metrics, console, trace):
      raise KeyboardInterrupt  # the loop took the signal
    seconds = time.perf_counter() - began
    return seconds - saved.seconds, saved.seconds


def bare_seconds(job: Job, evaluations: int) -> float:
  """Runs the same programs back to back, and waits at the end.

  Args:
    job: The run.
    evaluations: How often the loop measures the held-out loss.
  """
  state = jax.tree.map(jnp.copy, job.state)
  batches = [job.batch(step) for step in range(job.steps)]
  held_out = [job.place(batch) for batch in job.held_out]
  jax.block_until_ready((state, batches, held_out))
  began = time.perf_counter()
  for batch in batches:
    state, measured = job.step(state, job.frozen, batch)
  jax.block_until_ready((state, measured))
  for _ in range(evaluations):
    for batch in held_out:
      jax.block_until_ready(job.evaluate(state.trainable, job.frozen, batch))
  return time.perf_counter() - began


def main() -> None:
  """Builds the run once, then times both arms in turns."""
  spec = config.resolve(door.config_of(_CONFIG))
  console = Console(quiet=True)
  job = build(spec, console)
  evaluations = -(-job.steps // spec.eval.every)
  first = jax.tree.map(jnp.copy, job.state)  # compiles and warms up
  jax.block_until_ready(job.step(first, job.frozen, job.batch(0)))
  jax.block_until_ready(
    [
      job.evaluate(job.state.trainable, job.frozen, job.place(batch))
      for batch in job.held_out[:1]
    ]
  )
  rounds = []
  for _ in range(_ROUNDS.value):
    loop, checkpoint = loop_seconds(job, console)
    rounds.append((loop, bare_seconds(job, evaluations), checkpoint))
    print(f'loop {loop:.3f} s, bare {rounds[-1][1]:.3f} s', flush=True)
  loop, bare, checkpoint = map(statistics.median, zip(*rounds, strict=True))
  ratio = statistics.median(a / b for a, b, _ in rounds)
  print(
    f'{job.steps} steps and {evaluations} evaluations of'
    f' {len(job.held_out)} batches: the loop takes {ratio:.3f} × the bare'
    f' programs, {(loop - bare) / job.steps * 1e3:.2f} ms a step more of'
    f' {bare / job.steps * 1e3:.1f}; a checkpoint {checkpoint:.2f} s'
  )
  if _OUT.value:
    names = ('loop', 'bare', 'checkpoint')
    record = {
      'rounds': [dict(zip(names, r, strict=True)) for r in rounds],
      'ratio': ratio,
      'steps': job.steps,
      'evaluations': evaluations,
      'device': jax.devices()[0].device_kind,
      'config': dataclasses.asdict(spec),
    }
    text = json.dumps(record, indent=2, sort_keys=True, default=str)
    pathlib.Path(_OUT.value).write_text(text + '\n')


if __name__ == '__main__':
  door.enter(main)
