"""Bytes that devices exchange, read from a compiled program's text."""

import collections
import functools
from collections.abc import Iterator

from jlora.planning.hlo import Instruction, bytes_of, parse, trips_of

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)


def moved_bytes(text: str) -> dict[str, int]:
  """Returns the bytes that one device exchanges in a step, by kind.

  A collective counts the larger of what it reads and what it gives on one
  device: a gathered array whole, a reduced one before it is scattered. Inside
  a loop it counts as often as the loop runs.

  Args:
    text: From `compiled.as_text()`.
  """
  entry, computations = parse(text)

  @functools.cache
  def found(name: str) -> dict[str, tuple[str, int]]:
    """Returns kind and bytes by channel: a fused one has several lines."""
    result: dict[str, tuple[str, int]] = {}
    lines = computations.get(name, {})
    for key, line in lines.items():
      moved = {}
      if (kind := _kind(line.operation)) is not None:
        sources = (lines[x] for x in _sources(line, lines))
        size = max(bytes_of(line.type), sum(bytes_of(x.type) for x in sources))
        moved[_channel(line, lines) or f'{name} {key}'] = kind, size
      elif not line.operation.endswith(('-done', '-update')):
        for called in line.called:
          moved |= found(called)
      trips = trips_of(line, computations)
      for channel, (kind, size) in moved.items():
        old = result.get(channel, (kind, 0))[1]
        result[channel] = kind, max(old, size * trips)
    return result

  total: collections.Counter[str] = collections.Counter()
  for kind, size in found(entry).values():
    total[kind] += size
  return dict(total)


def _channel(line: Instruction, lines: dict[str, Instruction]) -> str:
  """Returns the channel of a collective; of one that ends, of its start."""
  starts = (lines[x].channel for x in line.operands if x in lines)
  return line.channel or next(filter(None, starts), '')


def _kind(operation: str) -> str | None:
  """Returns the kind of a collective where it ends; of a start, None."""
  kind = operation.removesuffix('-done')
  return kind if kind in KINDS else None


def _sources(line: Instruction, lines: dict[str, Instruction]) -> Iterator[str]:
  """Yields the names of the arrays that a collective reads."""
  for name in line.operands:
    if name not in lines:
      continue
    if lines[name].operation.endswith('-start'):
      yield from (x for x in lines[name].operands if x in lines)
    else:
      yield name
