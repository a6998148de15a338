"""A compiled program's text, in instructions that can be asked."""

import re
from typing import NamedTuple

_BITS = {'pred': 8, 'token': 0}  # of others, the number in their name
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (.*)$')
_OPERATION = re.compile(r' ([a-z][\w-]*)\(([^()]*)\)')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.-]+)'
  r'|(?:branch|called)_computations=\{([^}]*)\}'
)
_TRIPS = re.compile(r'known_trip_count\W+n\W+(\d+)')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_NAME = re.compile(r'%?([\w.-]+)')


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    operation: Such as 'all-gather-start'.
    type: Of its result, with layouts.
    operands: Names of what it reads.
    called: Names of the computations that it runs.
    trips: How often it runs them, where the compiler says so; else 0.
    channel: Of a collective; empty where it has none.
    text: What stands in its parentheses, such as a constant's value.
  """

  operation: str
  type: str
  operands: tuple[str, ...]
  called: tuple[str, ...]
  trips: int
  channel: str
  text: str


def parse(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
  """Returns the entry's name, and the lines of each computation by name.

  Args:
    text: From `compiled.as_text()`.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for raw in text.splitlines():
    if match := _COMPUTATION.match(raw):
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(raw)):
      current[match[1]] = _instruction(match[2])
  return entry, computations


def _instruction(text: str) -> Instruction:
  text = re.sub(r'/\*.*?\*/', '', text)
  bare = re.sub(r'\{[^{}]*\}', '', text.split(', metadata=')[0])
  match = _OPERATION.search(f' {bare}')
  operation, operands = match.groups() if match else ('', '')
  called = [
    name
    for single, several in _CALLED.findall(text)
    for name in _NAME.findall(single or several)
  ]
  trips, channel = _TRIPS.search(text), _CHANNEL.search(text)
  return Instruction(
    operation=operation,
    type=text.split(f' {operation}(')[0] if match else bare,
    operands=tuple(_NAME.findall(_ARRAY.sub('', operands))),
    called=tuple(called),
    trips=int(trips[1]) if trips else 0,
    channel=channel[1] if channel else '',
    text=operands,
  )


def trips_of(
  line: Instruction, computations: dict[str, dict[str, Instruction]]
) -> int:
  """Returns how often a line runs what it calls.

  Where the compiler does not say it of a loop, it is the number that the
  loop's condition compares with: those of scans count up from zero.

  Args:
    line: Such as a loop.
    computations: From `parse`.
  """
  if line.operation != 'while' or line.trips:
    return line.trips or 1
  limits = [
    int(inner.text)
    for name in line.called
    for inner in computations.get(name, {}).values()
    if inner.operation == 'constant'
    and inner.text.isdecimal()
    and _is_condition(computations[name])
  ]
  return max(limits, default=1)


def _is_condition(lines: dict[str, Instruction]) -> bool:
  return 0 < len(lines) < 8 and list(lines.values())[-1].type.startswith('pred')


def bytes_of(text: str) -> int:
  """Returns the bytes of all arrays of a type such as '(f32[2,3], u8[4])'.

  Args:
    text: In XLA's notation; layouts are skipped.
  """
  total = 0
  for dtype, shape in _ARRAY.findall(text):
    number = re.search(r'\d+', dtype)
    bits = _BITS.get(dtype, int(number[0]) if number else 0)
    size = 1
    for side in filter(None, shape.split(',')):
      size *= int(side)
    total += size * bits // 8
  return total
