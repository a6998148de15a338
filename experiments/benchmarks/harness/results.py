"""What a benchmark found: records in a JSON file, medians and ratios of them.

A ratio of speeds is formed within each round, where both arms ran one after
the other, and the median of these is reported: a machine that is slower for
some minutes slows both.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.benchmarks.harness.rounds import Rounds
from jlora.errors import DataError

Result = dict[str, Any]
RATE = 'tokens_per_s'
MOST = ('peak_bytes',)  # of these the largest counts, of all others the median
SAME = ('benchmark', 'settings', 'commit', 'versions', 'machine')


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the table, beside the arm's name and its ratios.

  Attributes:
    key: Of the figure in a record; an arm without it shows a dash.
    title: With the unit.
    scale: What the figure is divided by.
    digits: Behind the point.
  """

  key: str
  title: str
  scale: float = 1.0
  digits: int = 1


def make_result(
  name: str,
  settings: Mapping[str, Any],
  columns: tuple[Column, ...],
  ours: str,
  rounds: Rounds,
  facts: Mapping[str, Any],
) -> Result:
  """Returns what goes into the file.

  Args:
    name: Of the benchmark.
    settings: All that decides what was measured.
    columns: Of its table.
    ours: Name of the arm that the others are compared with.
    rounds: What was measured.
    facts: From `machine.describe`.
  """
  result = {
    'benchmark': name,
    'settings': dict(settings),
    **facts,
    'ours': ours,
    'columns': [dataclasses.asdict(column) for column in columns],
    'records': rounds.records,
    'failures': rounds.failures,
  }
  return {**result, 'summary': summarize(result)}


def summarize(result: Result) -> dict[str, dict[str, Any]]:
  """Returns the figures of each arm over all rounds, by its name.

  Every number of its records is there; `speed` is our rate over the arm's,
  `time` the arm's seconds a step over ours, and `peak` and `temp` our bytes
  over its.

  Args:
    result: With `records` and `ours`.
  """
  arms = dict.fromkeys(record['arm'] for record in result['records'])
  found = {arm: _figures(_of(result, arm)) for arm in arms}
  ours = found.get(result['ours'])
  for arm, figures in found.items():
    if ours is None or arm == result['ours'] or RATE not in figures:
      continue
    figures['speed'] = median_ratio(result, RATE, result['ours'], arm)
    if 'step_s' in figures:
      figures['time'] = median_ratio(result, 'step_s', arm, result['ours'])
    for name in ('peak', 'temp'):
      mine, theirs = (f.get(f'{name}_bytes') for f in (ours, figures))
      if mine and theirs:
        figures[name] = mine / theirs
  return found


def median_ratio(
  result: Result, key: str, above: str, below: str
) -> float | None:
  """Returns the median over the rounds of one arm's figure over another's.

  Args:
    result: With `records`.
    key: Of the figure.
    above: The one arm; rounds in which one of both is missing are left out.
    below: The other.

  Returns:
    The ratio; None if they share no round.
  """
  first, second = (
    {record['round']: record[key] for record in _of(result, arm)}
    for arm in (above, below)
  )
  both = first.keys() & second.keys()
  ratios = [first[n] / second[n] for n in both]
  return statistics.median(ratios) if ratios else None


def _of(result: Result, arm: str) -> list[dict[str, Any]]:
  return [record for record in result['records'] if record['arm'] == arm]


def _figures(records: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns one figure of several for each that is a number, and any text."""
  found: dict[str, Any] = {'rounds': len(records)}
  for key, values in _by_key(records):
    if isinstance(values[0], str):
      found[key] = values[0]
    elif isinstance(values[0], int | float):
      pick = max if key in MOST else statistics.median
      found[key] = pick(values)
  return found


def _by_key(records: list[dict[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
  skipped = ('arm', 'round', 'cold')
  keys = dict.fromkeys(key for record in records for key in record)
  for key in keys:
    if key not in skipped:
      yield key, [r[key] for r in records if r.get(key) is not None] or [None]


def save(path: pathlib.Path, result: Result) -> None:
  """Writes a result.

  Args:
    path: Replaced where it is there.
    result: From `make_result`.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + '\n')


def load(path: pathlib.Path) -> Result:
  """Reads a result.

  Args:
    path: Of the file.

  Raises:
    DataError: It is missing, or no result.
  """
  try:
    result = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise DataError(
      f'{path} cannot be read as a result ({error}); run the benchmark first'
    ) from error
  if not isinstance(result, dict) or 'records' not in result:
    raise DataError(f'{path} is no result of a benchmark; name another file')
  return result


def join(old: Result, new: Result) -> Result:
  """Returns a result with the rounds of both.

  Args:
    old: Of earlier rounds.
    new: Of later ones, numbered from `next_round(old)`.

  Raises:
    DataError: They were not measured alike.
  """
  for name in SAME:
    if old[name] != new[name]:
      raise DataError(
        f'rounds cannot be added: {name} was {old[name]} and is {new[name]};'
        ' run without --add to start anew'
      )
  result = {
    **new,
    'records': old['records'] + new['records'],
    'failures': new['failures'],
    'tried': old['tried'] | new['tried'],
  }
  return {**result, 'summary': summarize(result)}


def next_round(result: Result) -> int:
  """Returns the number of the first round that is not there yet."""
  return 1 + max((r['round'] for r in result['records']), default=-1)
