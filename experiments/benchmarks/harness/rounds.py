"""Arms in turn (A B A B …), so that a busy minute is shared by all of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from experiments.benchmarks.harness import processes
from experiments.benchmarks.harness.processes import Arm, ArmError, Limits

Say = Callable[[str], None]


@dataclasses.dataclass
class Rounds:
  """What the arms answered.

  Attributes:
    records: Figures, each with its `arm` and its `round`.
    failures: Sentences by arm.
  """

  records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  failures: dict[str, str] = dataclasses.field(default_factory=dict)


def take_turns(
  arms: Sequence[Arm],
  rounds: int,
  limits: Limits,
  say: Say,
  *,
  first: int = 0,
) -> Rounds:
  """Runs all arms once a round, each time in a fresh process.

  Args:
    arms: Those compared, in the order they are run in.
    rounds: How often; an arm that failed is not tried again.
    limits: What each process gets.
    say: Told each figure as it comes.
    first: Number of the first round.
  """
  found = Rounds()
  for number in range(first, first + rounds):
    for arm in arms:
      if arm.name in found.failures:
        continue
      try:
        record = processes.run(arm, limits)
      except ArmError as error:
        found.failures[arm.name] = str(error)
        say(str(error))
        continue
      found.records.append({'round': number, **_by_start(record)})
      say(f'round {number}: {arm.name}: {_rate(record)}')
  return found


def _by_start(record: dict[str, Any]) -> dict[str, Any]:
  """Returns a record whose `compile_s` tells first starts from later ones."""
  if 'compile_s' not in record:
    return record
  kept = {key: value for key, value in record.items() if key != 'compile_s'}
  name = 'cold_compile_s' if record['cold'] else 'warm_compile_s'
  return {**kept, name: record['compile_s']}


def _rate(record: dict[str, Any]) -> str:
  if 'tokens_per_s' in record:
    return f'{record["tokens_per_s"]:,.1f} tokens/s'
  return f'{record["flops_per_s"] / 1e9:,.1f} GFLOP/s'
