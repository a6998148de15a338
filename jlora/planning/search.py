"""The largest number that fits, with few tries."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jlora.planning.planner import Planner
from jlora.training.run_spec import RunSpec

TRIES = 8  # programs that a search may compile
_COUNTS = 50


class Found(NamedTuple):
  """What a search ended with.

  Attributes:
    size: The largest that fits; 0 where the smallest does not.
    exact: Whether the next one was seen not to fit.
  """

  size: int
  exact: bool

  def __str__(self) -> str:
    """Says whether it is the largest, or only known to fit."""
    return f'{self.size}' if self.exact else f'{self.size} or more'


def largest(
  fits: Callable[[int], bool], start: int, tries: int = TRIES
) -> Found:
  """Returns the largest whole number from 1 that fits.

  From `start` it goes up or down, by an eighth and then twice as far each
  time, and bisects what lies between one that fits and one that does not.

  Args:
    fits: Whether a number does; true up to some number, then false.
    start: The first that is tried.
    tries: How often `fits` may be called.
  """
  low, high, size = 0, None, max(start, 1)
  step = max(size // 8, 1)
  for _ in range(tries):
    if fits(size):
      low = size
    else:
      high = size
    if high is not None and high - low == 1:
      break
    if high is None:
      size, step = low + step, 2 * step
    elif low == 0:
      size, step = max(high - step, 1), 2 * step
    else:
      size = (low + high) // 2
  return Found(low, high is not None and high - low == 1)


def with_rows(spec: RunSpec, rows: int) -> RunSpec:
  """Returns a run whose microbatches have so many rows over all devices.

  Args:
    spec: The run.
    rows: Of one microbatch.
  """
  size = rows * spec.train.accumulate
  train = dataclasses.replace(spec.train, batch_size=size)
  return dataclasses.replace(spec, train=train)


def with_length(spec: RunSpec, length: int) -> RunSpec:
  """Returns a run with rows of another length.

  Args:
    spec: The run.
    length: Tokens a row.
  """
  data = dataclasses.replace(spec.data, max_length=length)
  return dataclasses.replace(spec, data=data)


def largest_rows(planner: Planner, spec: RunSpec) -> Found:
  """Returns the rows of the largest microbatch that fits on a device.

  Args:
    planner: Of the base and the machine.
    spec: From `Planner.prepare`.
  """
  devices = planner.row_devices(spec)
  first = spec.train.rows(devices)
  return _largest(planner, lambda rows: with_rows(spec, rows * devices), first)


def longest_rows(planner: Planner, spec: RunSpec, unit: int = 128) -> Found:
  """Returns the tokens of the longest rows that fit, in whole units.

  Args:
    planner: Of the base and the machine.
    spec: From `Planner.prepare`.
    unit: Tokens that lengths are multiples of.
  """
  most = planner.config.max_positions // unit
  first = min(-(-spec.data.max_length // unit), most)
  found = _largest(
    planner, lambda units: with_length(spec, units * unit), first, most
  )
  return Found(found.size * unit, found.exact)


def _largest(
  planner: Planner,
  make: Callable[[int], RunSpec],
  first: int,
  most: int = 1 << 30,
) -> Found:
  """Returns the largest of a family of runs; counting says where to start."""

  def counted(size: int) -> bool:
    return size <= most and planner.count(make(size)).fits

  def compiled(size: int) -> bool:
    return size <= most and planner.estimate(make(size)).fits

  found = largest(counted, first, _COUNTS)
  if not planner.can_compile(make(first)):
    return found
  return largest(compiled, found.size or first)
