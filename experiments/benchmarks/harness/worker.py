"""The inner side of an arm's process: reads its work, answers with figures.

Imports nothing but Python's own modules: what a peer's process holds is counted
as its memory.
"""

import contextlib
import json
import os
import pathlib
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MARK = 'figures of this arm: '  # ahead of the line with the answer


def serve(run: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
  """Does what stdin asks for and writes one line to stdout.

  Adds `peak_bytes`, the most memory that the process had resident, unless
  `run` gives it: it does where it goes on after the last step.

  Args:
    run: Takes the arm's work, returns figures by name.
  """
  work = json.load(sys.stdin)
  keep_to(work['threads'])
  try:
    with contextlib.redirect_stdout(sys.stderr):
      answer = run(work)
    answer.setdefault('peak_bytes', peak_bytes())
  except ModuleNotFoundError as error:
    answer = {'missing': error.name}
  except Exception as error:
    traceback.print_exc()
    text = ' '.join(str(error).split())
    answer = {'error': f'{type(error).__name__}: {text:.400}'}
  print(MARK + json.dumps(answer), flush=True)


def keep_to(threads: int) -> None:
  """Keeps this process to so many processors, where the system can do that.

  Args:
    threads: How many; XLA and torch then make as many threads.
  """
  if hasattr(os, 'sched_setaffinity'):
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:threads])


def peak_bytes() -> int:
  """Returns the most memory that this process had resident."""
  status = pathlib.Path('/proc/self/status')
  if status.exists():  # getrusage counts the process that this one came from
    for line in status.read_text().splitlines():
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(
  step: Callable[[int], float], tokens: Sequence[int], began: float
) -> dict[str, Any]:
  """Times steps after one that is not counted.

  Args:
    step: Runs the step of a number, waits for it, and returns its loss.
    tokens: Of each step, the first one's too.
    began: When the process was started, as `time.time` has it.

  Returns:
    `losses`, `steps_s`, their median `step_s`, `tokens_per_s` of all counted
    steps, at the median if all have as many tokens, and `ready_s` from the
    start of the process to the end of the first step.
  """
  losses, seconds, ready = [], [], 0.0
  for number in range(len(tokens)):
    start = time.perf_counter()
    losses.append(step(number))
    seconds.append(time.perf_counter() - start)
    ready = ready or time.time() - began
  median = statistics.median(seconds[1:])
  alike = len(set(tokens)) == 1
  rate = tokens[0] / median if alike else sum(tokens[1:]) / sum(seconds[1:])
  return {
    'losses': losses,
    'steps_s': seconds[1:],
    'step_s': median,
    'tokens_per_s': rate,
    'ready_s': ready,
  }
