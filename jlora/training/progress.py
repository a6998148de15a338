"""Where a run stands, and the updates that move it on.

Devices compute an update while the host prepares the next one and writes down
the one before: `start` hands an update over, `finished` waits for its numbers.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from jlora.core.state import TrainState
from jlora.errors import NonFiniteError
from jlora.training.job import Job


@dataclasses.dataclass(frozen=True)
class _Update:
  """An update that was handed to the devices.

  Attributes:
    step: Updates before it.
    tokens: Places of its batch that hold a token.
    began: When its batch was asked for.
    measured: What the step returns beside the state.
  """

  step: int
  tokens: int
  began: float
  measured: dict[str, Any]


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

  def __post_init__(self) -> None:
    """Reads the step, which later would wait for the devices."""
    self._step = int(self.state.step)
    self._running: collections.deque[_Update] = collections.deque()
    self._finished_at = -math.inf
    self._unsaid: list[tuple[int, float]] = []

  @property
  def step(self) -> int:
    """Updates so far, those included that the devices still compute."""
    return self._step

  def record(self) -> dict[str, Any]:
    """Returns all but the state, as JSON values; no update may be running."""
    names = (field.name for field in dataclasses.fields(self))
    return {name: getattr(self, name) for name in names if name != 'state'}

  def start(self, job: Job) -> None:
    """Hands the next update to the devices and does not wait for it.

    Args:
      job: The run.

    Raises:
      DataError: Its batch cannot be read; nothing has changed then.
    """
    step, began = self._step, time.perf_counter()
    with jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
      batch, tokens = job.batch(step), job.loader.tokens_in(step)
      self.state, measured = job.step(self.state, job.frozen, batch)
    self._step += 1
    self._running.append(_Update(step, tokens, began, measured))

  def finished(self, job: Job, *, running: int = 0) -> Iterator[dict[str, Any]]:
    """Waits for updates and yields the lines of metrics.jsonl that are due.

    Times are means since the line before: when the devices were done is known
    by when their numbers were read, which at an edge is later.

    Args:
      job: The run.
      running: How many of the latest updates are not waited for.

    Raises:
      NonFiniteError: More updates in a row than `train.max_skipped` were not
        finite. None of them was applied.
    """
    while len(self._running) > running:
      update = self._running.popleft()
      measured = jax.device_get(update.measured)
      # The devices began with it once they were done with the one before.
      began = max(update.began, self._finished_at)
      self._finished_at = time.perf_counter()
      self._unsaid.append((update.tokens, self._finished_at - began))
      step, skipped = update.step + 1, self.skipped
      self._count(step, measured, job.spec.train.max_skipped)
      if step != job.steps and step % job.spec.log.every:
        continue
      tokens, seconds = map(sum, zip(*self._unsaid, strict=True))
      updates = len(self._unsaid)
      self._unsaid.clear()
      yield {
        'step': step,
        'loss': float(measured['loss']),
        'tokens': int(measured['tokens']),
        'grad_norm': float(measured['grad_norm']),
        # A skipped update does not advance the schedule.
        'learning_rate': float(job.rates[update.step - skipped]),
        'skipped': self.skipped,
        'step_seconds': seconds / updates,
        'tokens_per_s': tokens / seconds,
      }

  def _count(self, step: int, measured: dict[str, Any], most: int) -> None:
    if measured['finite']:
      self.skipped_in_a_row = 0
      self.trained_tokens += int(measured['tokens'])
      return
    self.skipped += 1
    self.skipped_in_a_row += 1
    if self.skipped_in_a_row > most:
      raise NonFiniteError(
        f'loss or gradient was not finite in {self.skipped_in_a_row} updates'
        f' up to step {step}, and none of them was applied; lower'
        ' optim.learning_rate, or look at the data of these steps'
      )
