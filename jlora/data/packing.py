"""Examples side by side in rows of equal length."""

import bisect
from collections.abc import Sequence

import numpy as np

from jlora.data.batch import Batch
from jlora.data.tokens import Example
from jlora.errors import DataError

_WINDOW = 1024  # examples that are sorted and packed together


def pack_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
  """Packs by best fit decreasing, one window of examples after another.

  Args:
    lengths: Places that each example takes, in the order to be packed.
    row: Places in a row.

  Returns:
    Indices into `lengths`, a list for each row. The same lengths in the same
    order are always packed the same way.

  Raises:
    DataError: An example is longer than a row.
  """
  if max(lengths, default=0) > row:
    raise DataError(
      f'an example of {max(lengths)} tokens does not fit into a row of {row};'
      ' cut it, or raise data.max_length'
    )
  rows: list[list[int]] = []
  for start in range(0, len(lengths), _WINDOW):
    window = range(start, min(start + _WINDOW, len(lengths)))
    space: list[tuple[int, int]] = []  # places left and row, sorted
    for i in sorted(window, key=lambda i: -lengths[i]):
      at = bisect.bisect_left(space, (lengths[i], 0))
      if at == len(space):
        rows.append([])
        space.append((row, len(rows) - 1))
      left, tightest = space.pop(at)
      rows[tightest].append(i)
      bisect.insort(space, (left - lengths[i], tightest))
  return rows


def make_batch(
  rows: Sequence[Sequence[Example]], *, batch_size: int, max_length: int
) -> Batch:
  """Lays examples out in rows.

  Args:
    rows: The examples of each row, at most `batch_size` rows.
    batch_size: Rows of the batch; those that are missing stay empty.
    max_length: Places in a row.

  Returns:
    A batch of NumPy arrays, [batch_size, max_length] each.
  """
  shape = (batch_size, max_length)
  tokens, targets, segments, positions = (
    np.zeros(shape, np.int32) for _ in range(4)
  )
  loss_mask = np.zeros(shape, np.float32)
  for i, examples in enumerate(rows):
    start = 0
    for segment, example in enumerate(examples, 1):
      n = example.places
      place = (i, slice(start, start + n))
      tokens[place] = example.tokens[:n]
      targets[place] = example.tokens[1 : n + 1]
      loss_mask[place] = example.loss_mask[1 : n + 1]
      segments[place] = segment
      positions[place] = np.arange(n)
      start += n
  return Batch(tokens, targets, loss_mask, segments, positions)
