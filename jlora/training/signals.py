"""Signals: the first finishes the step, the second leaves at once."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
  """Whether someone asked the run to stop; a context manager.

  Attributes:
    requested: True after the first signal.
  """

  def __init__(self) -> None:
    """Starts without a request."""
    self.requested = False

  def __enter__(self) -> 'StopRequest':
    """Takes over both signals."""
    self._previous = {s: signal.signal(s, self._first) for s in _SIGNALS}
    return self

  def __exit__(self, *_: object) -> None:
    """Gives both signals back."""
    self._restore()

  def _first(self, number: int, frame: FrameType | None) -> None:
    self.requested = True
    self._restore()  # a second signal does what it did before

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
