"""What the arms of `generate.py` share: their work, and how it is timed."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_REPEATS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What an arm is asked for.

  Attributes:
    kind: What the weights are.
    folder: Of the weights, in float32.
    batch: Rows.
    prompt: Tokens of each prompt.
    new: New tokens of each row.
    rank: Of the adapters.
    threads: Processors of the process.
    began: When it was started.
  """

  kind: str
  folder: str
  batch: int
  prompt: int
  new: int
  rank: int
  threads: int = 1
  began: float = 0.0

  def prompts(self, vocab: int) -> np.ndarray:
    """Returns random tokens [batch, prompt]."""
    random = np.random.default_rng(0)
    return random.integers(5, vocab, (self.batch, self.prompt))

  def timed(self, generate: Callable[[int], Any]) -> dict[str, Any]:
    """Times `generate`, which takes how many new tokens to make.

    The time of a token is that of all but two, over their number; what is left
    of the time of two is the prompts'.
    """
    start = time.perf_counter()
    self._once(generate)
    first = time.perf_counter() - start
    short, whole = zip(
      *(self._once(generate) for _ in range(_REPEATS)), strict=True
    )
    short, whole = statistics.median(short), statistics.median(whole)
    token = (whole - short) / (self.new - 2)
    return {
      'tokens_per_s': self.batch * self.new / whole,
      'token_s': token,
      'prefill_s': short - token,
      'compile_s': max(0.0, first - short - whole),
    }

  def _once(self, generate: Callable[[int], Any]) -> tuple[float, float]:
    times = []
    for count in (2, self.new):
      start = time.perf_counter()
      generate(count)
      times.append(time.perf_counter() - start)
    return times[0], times[1]
