"""A trace of a few training steps, for `--profile`."""

import pathlib
import warnings
from collections.abc import Callable

import jax

WARM_UP = 2  # steps before the trace, where there are enough
STEPS = 3  # steps in it
# What the profiler raises where it finds another, or no trace where it looks.
_FAULTS = (OSError, RuntimeError, ValueError, KeyError)


class Trace:
  """Traces a few steps of a process; a context manager, which ends a trace.

  Each trace gets a folder of its own, named by the time, so that a continued
  run adds another.

  Attributes:
    folder: Where traces go.
    first: Updates before the trace begins; None where nothing is traced.
    last: Updates before it ends.
  """

  def __init__(
    self,
    folder: pathlib.Path | None,
    done: int,
    steps: int,
    say: Callable[[str], None],
  ):
    """Chooses the steps, after a warm-up where some are left for it.

    Args:
      folder: Where traces go; None traces nothing.
      done: Updates so far.
      steps: Updates of the whole run.
      say: Prints a line.
    """
    self.folder = folder
    self.first = self.last = None
    self._say, self._running = say, False
    if folder is None:
      return
    if done >= steps:
      say(f'--profile: no step is left of {steps}, so there is no trace')
      return
    self.first = done + min(WARM_UP, steps - done - 1)
    self.last = min(self.first + STEPS, steps)

  def is_edge(self, step: int) -> bool:
    """Whether a trace begins or ends here; no update may be running then."""
    return step in (self.first, self.last)

  def begin(self, step: int) -> None:
    """Begins the trace where it is time to.

    Args:
      step: Updates so far.
    """
    if step == self.first:
      try:
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
      except _FAULTS as error:
        self.first = self.last = None
        warnings.warn(
          f'no trace is made: {error}; training goes on', stacklevel=2
        )
        return
      self._running = True

  def end(self, step: int) -> None:
    """Ends the trace where it is time to, and says where it lies.

    Args:
      step: Updates so far.
    """
    if step == self.last:
      self._write(f'steps {self.first + 1} to {self.last}')

  def __enter__(self) -> 'Trace':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Writes what was traced of a run that stops within it."""
    self._write(f'steps from {(self.first or 0) + 1} to the stop')

  def _write(self, what: str) -> None:
    if not self._running:
      return
    self._running = False
    try:
      jax.profiler.stop_trace()
    except _FAULTS as error:
      warnings.warn(
        f'the trace could not be written to {self.folder}: {error}; training'
        ' goes on',
        stacklevel=3,
      )
      return
    self._say(
      f'traced {what}: open {self.folder}/plugins/profile/*/perfetto_trace'
      '.json.gz at ui.perfetto.dev, or see more with: pip install xprof &&'
      f' xprof --logdir={self.folder}'
    )
