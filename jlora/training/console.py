"""What a person sees while a run trains."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)
from rich.table import Table

_QUIET_SECONDS = 10  # between lines where there is no terminal for a bar


class Ticker:
  """A progress bar in a terminal, a line now and then elsewhere."""

  def __init__(self, console: Console, steps: int, start: int):
    """Starts at a step.

    Args:
      console: Where to show it.
      steps: Steps of the whole run.
      start: Steps that are done.
    """
    self._console = console
    self._steps = steps
    self._last_line = time.monotonic()
    self._bar = Progress(
      TextColumn('training'),
      BarColumn(bar_width=20),
      MofNCompleteColumn(),
      TextColumn('{task.fields[status]}'),
      TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self._task = self._bar.add_task('', total=steps, completed=start, status='')

  def __enter__(self) -> 'Ticker':
    """Shows the bar."""
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    """Leaves the bar as it is."""
    self._bar.stop()

  def tick(self, line: dict[str, Any]) -> None:
    """Shows a training line of metrics.jsonl.

    Args:
      line: With `step`, `loss` and `tokens_per_s`.
    """
    status = f'loss {line["loss"]:.3f}, {line["tokens_per_s"]:,.0f} tokens/s'
    self._bar.update(self._task, completed=line['step'], status=status)
    quiet = time.monotonic() - self._last_line < _QUIET_SECONDS
    if self._console.is_terminal or (quiet and line['step'] < self._steps):
      return
    self._last_line = time.monotonic()
    self._console.print(f'step {line["step"]}/{self._steps}  {status}')

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    self._console.print(text)


def show_table(console: Console, title: str, rows: Any) -> None:
  """Prints pairs of a name and a value.

  Args:
    console: Where to.
    title: Above the table.
    rows: Pairs of text.
  """
  table = Table(
    title=title,
    title_justify='left',
    show_header=False,
    box=None,
    pad_edge=False,
  )
  table.add_column(style='dim')
  table.add_column(justify='right')
  for name, value in rows:
    table.add_row(name, value)
  console.print(table)
