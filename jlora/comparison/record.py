"""comparison.json: everything that the runs of a comparison measured."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jlora.checkpoints.bases import open_base
from jlora.comparison.flops import step_flops
from jlora.comparison.spec import ComparisonSpec, flat
from jlora.comparison.tasks import Task
from jlora.errors import ConfigError
from jlora.training.run_spec import RunSpec

_KEPT = (
  'base_model',
  'compiled_peak_bytes',
  'data_digest',
  'process_peak_bytes',
  'skipped_updates',
  'steps',
  'trainable_params',
  'trained_tokens',
  'tuned_model',
  'versions',
)


def gather(
  spec: ComparisonSpec,
  trained: Sequence[Task],
  timed: Sequence[Task],
  *,
  grid: dict[str, Any],
  command: str,
) -> dict[str, Any]:
  """Reads the run folders of a comparison.

  Args:
    spec: The comparison, at the learning rates that were chosen.
    trained: A run for each arm and seed.
    timed: Short runs, for the step time; may be empty.
    grid: Pairs of learning rate and held-out loss by arm; may be empty.
    command: What made them.

  Returns:
    JSON values; report and figures are made of nothing else.

  Raises:
    ConfigError: Runs of one seed saw different data, versions differ, or a
      loss is not finite.
  """
  base = open_base(next(iter(spec.arms.values())).base)
  shared, differing = _split_fields(spec)
  arms = {}
  for name, run in spec.arms.items():
    arms[name] = {
      'kind': _kind(run),
      'fields': differing[name],
      'flops': step_flops(run, base.config),
      'runs': [read_run(t.folder, t.spec) for t in trained if t.arm == name],
      'timing': [step_times(t.folder) for t in timed if t.arm == name],
    }
  _check_alike(arms)
  return {
    'arms': arms,
    'base': base.describe(),
    'base_sha256': base.sha256,
    'command': command,
    'grid': grid,
    'machine': _machine(),
    'order': list(arms),
    'parameters': base.parameters,
    'shared': shared,
    'versions': next(iter(arms.values()))['runs'][0]['versions'],
  }


def read_run(folder: pathlib.Path, run: RunSpec) -> dict[str, Any]:
  """Returns what a finished run measured.

  Args:
    folder: Its run folder.
    run: Its spec.
  """
  summary = json.loads((folder / 'summary.json').read_text())
  if summary['tuned_model']['eval_loss'] is None:
    raise ConfigError(
      f'the run in {folder} ended with a held-out loss that is not finite, at'
      f' optim.learning_rate={run.optim.learning_rate}; lower it for this arm'
    )
  parts = summary['bytes']
  result = folder / ('adapter' if run.is_adapter else 'model')
  return {
    **{name: summary[name] for name in _KEPT},
    'bytes': {
      'base': parts['frozen, quantized'] + parts['frozen, dense'],
      'trained': parts['trainable'],
      'gradients': parts['trainable'],  # of the same shapes, float32 too
      'optimizer': parts['optimizer state'],
    },
    'file_bytes': sum(x.stat().st_size for x in result.glob('*.safetensors')),
    'held_out': _curve(folder),
    'seed': run.seed,
    'step_seconds': step_times(folder),
  }


def step_times(folder: pathlib.Path) -> list[float]:
  """Returns the seconds that each step of a run took."""
  return [x['step_seconds'] for x in _metrics(folder) if 'step_seconds' in x]


def final_loss(folder: pathlib.Path) -> float | None:
  """Returns the held-out loss at a run's end, or None where it failed."""
  path = folder / 'summary.json'
  if not path.is_file():
    return None
  return json.loads(path.read_text())['tuned_model']['eval_loss']


def _curve(folder: pathlib.Path) -> list[dict[str, float]]:
  """Returns the held-out loss over the seconds spent in steps so far."""
  seconds, points = 0.0, []
  for line in _metrics(folder):
    seconds += line.get('step_seconds', 0.0)
    if line.get('eval_loss') is not None:
      points.append(
        {'step': line['step'], 'seconds': seconds, 'loss': line['eval_loss']}
      )
  return points


def _metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def _kind(run: RunSpec) -> str:
  if not run.is_adapter:
    return 'full'
  return 'lora' if run.quant is None else 'qlora'


def _split_fields(
  spec: ComparisonSpec,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """Returns the fields that all arms share, and the others by arm."""
  fields = {name: flat(run) for name, run in spec.arms.items()}
  for name, run in spec.arms.items():
    quant = {k: v for k, v in fields[name].items() if k.startswith('quant')}
    fields[name] = {k: v for k, v in fields[name].items() if k not in quant}
    fields[name]['quant'] = run.quant and ', '.join(
      f'{key.removeprefix("quant.")}={value}'
      for key, value in quant.items()
      if key in ('quant.format', 'quant.block_size', 'quant.double_quant')
    )
  first = next(iter(fields.values()))
  equal = {
    k: v for k, v in first.items() if all(f[k] == v for f in fields.values())
  }
  equal.pop('seed', None)
  differing = {
    name: {k: v for k, v in f.items() if k not in equal and k != 'seed'}
    for name, f in fields.items()
  }
  return equal, differing


def _check_alike(arms: dict[str, Any]) -> None:
  """Requires equal data for each seed, and equal versions."""
  first_name, first = next(iter(arms.items()))
  for name, arm in arms.items():
    for one, other in zip(first['runs'], arm['runs'], strict=True):
      for field in ('data_digest', 'steps', 'versions'):
        if one[field] != other[field]:
          raise ConfigError(
            f'with seed {one["seed"]}, {field} is {one[field]} for arm'
            f' {first_name!r} and {other[field]} for {name!r}; remove the run'
            ' folders of that seed to run them again'
          )


def _machine() -> dict[str, Any]:
  cores = (
    len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count()
  )
  memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return {'cores': cores, 'memory_bytes': memory}
