"""The flags and the course of every benchmark that compares arms.

A front door defines flags of its own, makes a `Benchmark` and a list of `Arm`s,
and calls `run` with the `limits()`:

  doors.check()
  with doors.limits() as limits:
    doors.run(Benchmark(name=…, ours='jlora', …), arms, limits)

To add an arm, write a module that ends with `worker.serve(run)`: `run` takes
`Arm.work`, a dict as JSON has it, with `threads` and `began` added, and returns
a flat dict of figures. `tokens_per_s` must be there, of which the ratios are
made; `compile_s` is told apart by whether the cache of programs was empty;
`peak_bytes` is added. Any other figure is kept, and shown where a column names
it. Such a module imports what it measures and `harness.worker`, and nothing
heavier. The weights in a folder come from `models.find_model(…).write(folder)`.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.benchmarks.harness import (
  machine,
  processes,
  results,
  rounds,
  tables,
)
from experiments.benchmarks.harness.processes import Arm, Limits
from experiments.benchmarks.harness.results import Column
from experiments.benchmarks.harness.rounds import Rounds
from jlora.errors import ConfigError

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each arm is run.')
_THREADS = flags.DEFINE_integer('threads', 2, 'Processors of each process.')
_TIMEOUT = flags.DEFINE_float('timeout', 1800.0, 'Seconds of each process.')
_OUT = flags.DEFINE_string('out', None, 'File of the result.')
_ADD = flags.DEFINE_bool('add', False, 'Whether to add to rounds in the file.')
_CACHE = flags.DEFINE_string('cache', None, 'Folder of compiled programs.')
_RENDER = flags.DEFINE_bool('render', False, 'Only write tables to README.md.')


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What is compared.

  Attributes:
    name: Of the benchmark.
    file: Name of the result's file, without its ending.
    ours: Name of the arm that the others are compared with.
    columns: Of its table.
    settings: All that decides what is measured, for the caption.
    finish: Adds to the figures of all rounds, and to the failures.
    tried: Speeds from before the first round, by what was tried.
  """

  name: str
  file: str
  ours: str
  columns: tuple[Column, ...]
  settings: Mapping[str, Any]
  finish: Callable[[Rounds], None] = lambda _: None
  tried: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def path(self) -> pathlib.Path:
    """Where the result goes: `--out`, or a file in results/."""
    if _OUT.value:
      return pathlib.Path(_OUT.value).expanduser()
    kept = ''.join(c if c.isalnum() or c in '-_.' else '-' for c in self.file)
    return tables.RESULTS / f'{kept}.json'

  @property
  def earlier(self) -> dict[str, Any]:
    """With `--add`, the figures in the file by arm; else none."""
    return self.old['summary'] if self.old else {}

  @functools.cached_property
  def old(self) -> results.Result | None:
    """With `--add`, what is in the file, if it is there."""
    if _ADD.value and self.path.exists():
      return results.load(self.path)
    return None


def require_least(*flags: tuple[Any, int]) -> None:
  """Refuses flags that are too small.

  Args:
    *flags: Of absl, each with the least that it can be.

  Raises:
    ConfigError: One is less.
  """
  for flag, least in flags:
    require(flag.name, flag.value, flag.value >= least, f'{least} or more')


def require(name: str, value: Any, holds: bool, wanted: str) -> None:
  """Refuses the value of a flag.

  Args:
    name: Of the flag.
    value: Its value.
    holds: Whether it can be right.
    wanted: What it must be, such as '1 or more'.

  Raises:
    ConfigError: It cannot be right.
  """
  if not holds:
    raise ConfigError(f'--{name} is {value}; it must be {wanted}')


def check() -> None:
  """Checks the flags defined here.

  Raises:
    ConfigError: One of them cannot be right.
  """
  most = os.cpu_count() or 1
  require('rounds', _ROUNDS.value, _ROUNDS.value > 0, '1 or more')
  threads = _THREADS.value
  require('threads', threads, 1 <= threads <= most, f'from 1 to {most}')
  require('timeout', _TIMEOUT.value, _TIMEOUT.value > 0, 'above 0')


def rendered() -> bool:
  """With `--render`, writes the tables into README.md and returns True."""
  if not _RENDER.value:
    return False
  page = tables.README
  page.write_text(tables.rewritten(page.read_text(), tables.render()))
  print(f'written to {page}')
  return True


@contextlib.contextmanager
def limits() -> Iterator[Limits]:
  """Yields what each process gets, by the flags."""
  with processes.compiled_programs(_CACHE.value) as cache:
    yield Limits(_THREADS.value, _TIMEOUT.value, cache)


def run(benchmark: Benchmark, arms: Sequence[Arm], limits: Limits) -> None:
  """Runs the arms in turn, writes the result and prints its table.

  Args:
    benchmark: What is compared.
    arms: Ours first.
    limits: What each process gets.

  Raises:
    ConfigError: No arm could be run.
    DataError: `--add` finds rounds that were measured differently.
  """
  path, old = benchmark.path, benchmark.old
  found = rounds.take_turns(
    arms,
    _ROUNDS.value,
    limits,
    say,
    first=results.next_round(old) if old else 0,
  )
  if not found.records:
    raise ConfigError(
      f'no arm could be run: {"; ".join(found.failures.values())}'
    )
  benchmark.finish(found)
  result = results.make_result(
    benchmark.name,
    benchmark.settings,
    benchmark.columns,
    benchmark.ours,
    found,
    machine.describe(limits.threads),
  )
  result['tried'] = dict(benchmark.tried)
  result = results.join(old, result) if old else result
  results.save(path, result)
  print(f'\n{tables.table(result)}\n\nwritten to {path}')


def say(text: str) -> None:
  """Prints at once.

  Args:
    text: A line.
  """
  print(text, flush=True)
