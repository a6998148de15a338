"""Arrays that a compiled program writes to memory, read from its text."""

import collections
import math
import re
from collections.abc import Iterable

from jlora.planning.hlo import Instruction, bytes_of, parse, trips_of

Array = tuple[str, tuple[int, ...]]  # dtype and sides, those of one left out
# They name what is there already, or begin what another line ends.
_NOT_WRITTEN = (
  'bitcast',
  'constant',
  'get-tuple-element',
  'parameter',
  'tuple',
)
_RUN = ('call', 'conditional', 'while')
_PLACED = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?')
_ELSEWHERE = re.compile(r'S\([1-9]\d*\)')  # a TPU's memory on the chip


def written_arrays(text: str) -> dict[Array, int]:
  """Returns how often each kind of array is written to memory in a step.

  What lies within a fusion is not written, nor what a TPU keeps on the chip.
  Inside a loop an array counts as often as the loop runs; of branches, the one
  that writes most bytes counts.

  Args:
    text: From `compiled.as_text()`.
  """
  entry, computations = parse(text)

  def written(name: str) -> collections.Counter[Array]:
    total: collections.Counter[Array] = collections.Counter()
    for line in computations.get(name, {}).values():
      if line.operation in _RUN:
        inner = [written(called) for called in line.called]
        if line.operation == 'conditional':
          inner = [max(inner, key=_bytes)]
        trips = trips_of(line, computations)
        for found in inner:
          total.update({array: n * trips for array, n in found.items()})
      else:
        total.update(_results(line))
    return total

  return dict(written(entry))


def written_kernels(
  text: str, kernels: Iterable[tuple[int, int]]
) -> dict[str, int]:
  """Returns the bytes of dense kernels that a step writes, by dtype.

  Arrays of floats count that have a kernel's sides, or those of half of its
  rows (the planes of 4-bit codes), divided further or not. An activation with
  the very sides of a kernel would count too.

  Args:
    text: From `compiled.as_text()`.
    kernels: [in, out] of the kernels that are stored quantized.
  """
  wanted = {
    sides for n, out in kernels for sides in ((n, out), (-(-n // 2), out))
  }
  total: collections.Counter[str] = collections.Counter()
  for (dtype, sides), times in written_arrays(text).items():
    if re.match(r'b?f\d', dtype) and any(_is(sides, x) for x in wanted):
      total[dtype] += times * _bytes({(dtype, sides): 1})
  return dict(total)


def _is(sides: tuple[int, ...], kernel: tuple[int, int]) -> bool:
  if math.prod(sides) != math.prod(kernel):
    return False
  return any(math.prod(sides[:i]) == kernel[0] for i in range(len(sides)))


def _results(line: Instruction) -> list[Array]:
  if line.operation in _NOT_WRITTEN or line.operation.endswith('-start'):
    return []
  return [
    (dtype, tuple(int(n) for n in sides.split(',') if n not in ('', '1')))
    for dtype, sides, layout in _PLACED.findall(line.type)
    if not _ELSEWHERE.search(layout)
  ]


def _bytes(arrays: dict[Array, int]) -> int:
  return sum(
    n * bytes_of(f'{dtype}[{",".join(map(str, sides))}]')
    for (dtype, sides), n in arrays.items()
  )
