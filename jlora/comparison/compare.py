"""The honest comparison: the same data and budget for every arm.

Its stages, in order:

1. check that the arms may be compared, and that earlier runs are theirs
2. choose learning rates over a grid, where one is asked for
3. train every arm with every seed, each in a fresh process
4. time short rounds A B C A B C, where they are asked for
5. gather everything in comparison.json and write report and figures from it

A run that has ended is not run again.
"""

import dataclasses
import json
import os
import pathlib

from rich.console import Console

from jlora.comparison.record import final_loss, gather
from jlora.comparison.report import write_report
from jlora.comparison.spec import ComparisonSpec
from jlora.comparison.tasks import (
  Task,
  runs,
  searches,
  timing,
  with_rate,
)
from jlora.comparison.workers import WorkerError
from jlora.errors import ConfigError


def compare(
  spec: ComparisonSpec,
  workdir: os.PathLike[str] | str,
  console: Console,
  *,
  command: str,
) -> bool:
  """Runs a comparison to its end, or continues one.

  Args:
    spec: The arms and how often they run.
    workdir: Folder of the comparison, which holds the run folders.
    console: Where progress is shown.
    command: What a reader types to get the same; it is recorded.

  Returns:
    Whether it ended; False where a signal stopped a run.

  Raises:
    JloraError: The input is wrong, or a run failed.
  """
  root = _make_folder(workdir)
  searched = list(searches(spec, root))
  if not _run_all(searched, console, may_fail=True):
    return False
  spec, grid = _chosen(spec, searched)
  trained, timed = list(runs(spec, root)), list(timing(spec, root))
  if not _run_all([*trained, *timed], console):
    return False
  record = gather(spec, trained, timed, grid=grid, command=command)
  text = json.dumps(record, indent=1, sort_keys=True) + '\n'
  (root / 'comparison.json').write_text(text)
  console.print(write_report(root), markup=False, highlight=False)
  console.print(f'written to {root.absolute()}')
  return True


def _make_folder(workdir: os.PathLike[str] | str) -> pathlib.Path:
  root = pathlib.Path(workdir)
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(
      f'--workdir {root} cannot be written: {error}; choose another'
    ) from error
  return root


def _run_all(
  tasks: list[Task], console: Console, *, may_fail: bool = False
) -> bool:
  """Runs tasks in order; returns False where a signal stopped one."""
  for task in tasks:
    task.check()
  for number, task in enumerate(tasks, 1):
    again = ', done before' if task.is_done else ''
    title = f'{number}/{len(tasks)} {task.folder.name}{again}'
    console.rule(title, align='left')
    try:
      if not task.run():
        return False
    except WorkerError as error:
      if not (may_fail and error.exit_code == 3):
        raise
      console.print(f'{error}', markup=False)
  return True


def _chosen(
  spec: ComparisonSpec, searched: list[Task]
) -> tuple[ComparisonSpec, dict[str, list[tuple[float, float | None]]]]:
  """Returns the spec at the best rates, and the loss of each rate by arm."""
  if not searched:
    return spec, {}
  grid = {
    arm: [
      (t.spec.optim.learning_rate, final_loss(t.folder))
      for t in searched
      if t.arm == arm
    ]
    for arm in spec.arms
  }
  arms = {}
  for arm, run in spec.arms.items():
    losses = [(loss, rate) for rate, loss in grid[arm] if loss is not None]
    if not losses:
      raise ConfigError(
        f'arm {arm!r} failed at each learning rate of the grid'
        f' ({", ".join(f"{rate:.3g}" for rate, _ in grid[arm])}); lower it'
      )
    arms[arm] = with_rate(run, min(losses)[1])
  return dataclasses.replace(spec, arms=arms), grid
