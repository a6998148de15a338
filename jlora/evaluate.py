r"""Measures base and tuned model on a run's held-out data.

  python -m jlora.evaluate --run=DIR

Prints loss, perplexity and, for tasks with a verifier, exact match of both,
and writes them to evaluation.json in the run folder.
"""

import dataclasses
import pathlib

from absl import flags

from jlora import door
from jlora.errors import ConfigError

_RUN = flags.DEFINE_string('run', None, 'Run folder.')


def main() -> None:
  """Checks the flags, then evaluates."""
  if _RUN.value is None:
    raise ConfigError('--run is missing; name a run folder, such as runs/qlora')
  from jlora import runs

  spec = runs.load_spec(_RUN.value)
  result = runs.result_of(_RUN.value, spec)

  import jax
  from rich.console import Console

  from jlora.checkpoints.adapters import START_FILE
  from jlora.checkpoints.starts import load_starts
  from jlora.training.evaluation import evaluate_both, load_trained
  from jlora.training.job import build
  from jlora.training.report import to_json
  from jlora.training.run_spec import MeshSpec

  console = Console(soft_wrap=True, highlight=False)
  if not spec.mesh.fits(jax.device_count()):  # trained on another machine
    spec = dataclasses.replace(spec, mesh=MeshSpec())
  start = pathlib.Path(_RUN.value) / START_FILE
  job = build(spec, console, load_starts(start) if start.is_file() else None)
  job.check_origin(runs.origin_of(_RUN.value))
  scores = evaluate_both(job, load_trained(job, result))
  for name, fields in scores.items():
    values = (f'{key} {value:.4g}' for key, value in fields.items())
    console.print(f'{name}: {", ".join(values)}', highlight=False)
  path = pathlib.Path(_RUN.value) / 'evaluation.json'
  path.write_text(to_json(scores))


if __name__ == '__main__':
  door.enter(main)
