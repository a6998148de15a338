"""The arms of `generate.py`, and its table."""

import dataclasses
import pathlib
from collections.abc import Mapping

from experiments.benchmarks.harness import doors
from experiments.benchmarks.harness.generation import Work
from experiments.benchmarks.harness.models import Model
from experiments.benchmarks.harness.processes import Arm
from experiments.benchmarks.harness.results import Column

_PLACE = 'experiments.benchmarks.arms'
_ARMS = (
  ('jlora', 'generate_ours', 'dense'),
  ('jlora NF4 + adapter', 'generate_ours', 'nf4'),
  ('jlora NF4 + adapter, merged', 'generate_ours', 'merged'),
  ('transformers', 'generate_peft', 'dense'),
  ('PEFT', 'generate_peft', 'adapter'),
  ('PEFT + bitsandbytes NF4', 'generate_peft', 'nf4'),
)
_COLUMNS = (
  Column('tokens_per_s', 'tokens/s'),
  Column('prefill_s', 'prefill, s', digits=2),
  Column('token_s', 'ms a token', 1e-3),
  Column('peak_bytes', 'process peak, GiB', 2**30, 2),
  Column('compile_s', 'compile, s'),
)


def compare(
  settings: Mapping[str, int], model: Model, folder: pathlib.Path
) -> None:
  """Runs all arms in turn, and writes and prints their figures.

  Args:
    settings: 'batch', 'prompt', 'new' and 'rank', as in `Work`.
    model: What generates.
    folder: Where its weights are written, made by this.

  Raises:
    ConfigError: No arm could be run.
  """
  model.write(folder)
  arms = [
    Arm(
      title,
      f'{_PLACE}.{module}',
      dataclasses.asdict(Work(kind=kind, folder=str(folder), **settings)),
    )
    for title, module, kind in _ARMS
  ]
  benchmark = doors.Benchmark(
    name='generate',
    file='generate-{batch}x{prompt}+{new}'.format(**settings),
    ours='jlora',
    columns=_COLUMNS,
    settings=settings,
  )
  with doors.limits() as limits:
    doors.run(benchmark, arms, limits)
