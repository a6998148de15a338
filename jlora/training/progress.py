"""Where a run stands, and the one update that moves it on."""

import dataclasses
import math
import time
from typing import Any

import jax

from jlora.core.state import TrainState
from jlora.errors import NonFiniteError
from jlora.training.job import Job


@dataclasses.dataclass
class Progress:
  """Where a run stands: everything that a checkpoint brings back.

  Attributes:
    state: Trainable parameters, optimizer state and step.
    before: Scores of the base on held-out data.
    texts: Its answers, as many as samples.md shows.
    eval_loss: Latest held-out loss.
    eval_step: Updates before it was measured.
    best_loss: Lowest held-out loss after an update.
    trained_tokens: Tokens learned so far.
    skipped: Updates so far that were not finite, and so not applied.
    skipped_in_a_row: How many of them were the latest updates.
  """

  state: TrainState
  before: dict[str, float]
  texts: list[str]
  eval_loss: float
  eval_step: int = 0
  best_loss: float = math.inf
  trained_tokens: int = 0
  skipped: int = 0
  skipped_in_a_row: int = 0

  @property
  def step(self) -> int:
    """Updates so far."""
    return int(self.state.step)

  def record(self) -> dict[str, Any]:
    """Returns all but the state, as JSON values."""
    names = (field.name for field in dataclasses.fields(self))
    return {name: getattr(self, name) for name in names if name != 'state'}

  def update(self, job: Job) -> dict[str, Any]:
    """Makes one update and returns its line of metrics.jsonl.

    Args:
      job: The run.

    Raises:
      NonFiniteError: More updates in a row than `train.max_skipped` were not
        finite. None of them was applied.
    """
    step, skipped = self.step, self.skipped
    began = time.perf_counter()
    batch = job.batch(step)
    self.state, measured = job.step(self.state, job.frozen, batch)
    measured = jax.device_get(measured)
    seconds = time.perf_counter() - began
    self._count(measured, job.spec.train.max_skipped)
    return {
      'step': step + 1,
      'loss': float(measured['loss']),
      'tokens': int(measured['tokens']),
      'grad_norm': float(measured['grad_norm']),
      # A skipped update does not advance the schedule.
      'learning_rate': float(job.schedule(step - skipped)),
      'skipped': self.skipped,
      'step_seconds': seconds,
      'tokens_per_s': job.loader.tokens_in(step) / seconds,
    }

  def _count(self, measured: dict[str, Any], most: int) -> None:
    if measured['finite']:
      self.skipped_in_a_row = 0
      self.trained_tokens += int(measured['tokens'])
      return
    self.skipped += 1
    self.skipped_in_a_row += 1
    if self.skipped_in_a_row > most:
      raise NonFiniteError(
        f'loss or gradient was not finite in {self.skipped_in_a_row} updates'
        f' up to step {self.step}, and none of them was applied; lower'
        ' optim.learning_rate, or look at the data of these steps'
      )
