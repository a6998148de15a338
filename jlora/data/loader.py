"""Batches in an order that is a pure function of the seed and the step."""

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.data.batch import Batch
from jlora.data.mixing import Mixture
from jlora.data.packing import make_batch, pack_rows
from jlora.data.tokens import Example
from jlora.errors import DataError


class Loader:
  """Gives the batch of any step; the step is all the state there is.

  Each epoch packs a fresh permutation of the examples and shuffles the rows.
  The last batch of an epoch is completed with empty rows, so an epoch holds
  every example exactly once, or what a mixture takes of them. Packing another
  order can take another number of rows, so epochs may differ by a few steps;
  reaching a step packs the epochs before it once, lengths only, which takes
  microseconds an example.

  Attributes:
    batch_size: Rows a batch.
    max_length: Places a row.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    pack: bool = True,
    seed: int = 0,
    mixture: Mixture | None = None,
  ):
    """Takes examples that fit into a row.

    Args:
      examples: The examples, at least one, each with a token to learn.
      batch_size: Rows a batch.
      max_length: Places a row.
      pack: Whether examples share rows.
      seed: Which order.
      mixture: Which of the examples an epoch holds; None is all.

    Raises:
      DataError: There is no example, or one does not fit into a row.
    """
    if not examples:
      raise DataError('there is no example to train on; check data.train')
    self.batch_size = batch_size
    self.max_length = max_length
    self._examples = examples
    self._lengths = np.array([e.places for e in examples])
    self._pack = pack
    self._seed = seed
    self._mixture = mixture or Mixture((len(examples),), (None,))
    self._starts = [0]  # first step of every epoch that is known
    self._epoch, self._rows = -1, []
    self._load_epoch(0)

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self._examples)

  @property
  def steps_per_epoch(self) -> int:
    """Batches in the first epoch."""
    return self._starts[1]

  def steps_in(self, epochs: float) -> int:
    """Returns the batches in a number of epochs, at least one.

    Args:
      epochs: How many; of a last, partial epoch its share is rounded up.
    """
    whole = int(epochs)
    self._load_epoch(whole)
    start, stop = self._starts[whole : whole + 2]
    return max(start - int(-(epochs - whole) * (stop - start) // 1), 1)

  def epoch_of(self, step: int) -> int:
    """Returns the epoch that a step belongs to; both count from zero."""
    while self._starts[-1] <= step:
      self._load_epoch(len(self._starts) - 1)
    return bisect.bisect_right(self._starts, step) - 1

  def batch(self, step: int, rows: slice = slice(None)) -> Batch:
    """Returns the batch of a step, or some of its rows.

    Args:
      step: Counts from zero over all epochs.
      rows: Of the batch; no other row is made.

    Returns:
      NumPy arrays, [rows, max_length] each.

    Raises:
      DataError: The step is negative.
    """
    wanted = range(self.batch_size)[rows]
    return make_batch(
      [[self._examples[i] for i in row] for row in self._rows_of(step)[rows]],
      batch_size=len(wanted),
      max_length=self.max_length,
    )

  def tokens_in(self, step: int) -> int:
    """Returns the places of a step's batch that hold a token.

    Args:
      step: Counts from zero over all epochs.
    """
    return int(sum(self._lengths[row].sum() for row in self._rows_of(step)))

  def state(self, step: int) -> dict[str, Any]:
    """Returns nothing: the step alone says where a run stands.

    Args:
      step: Counts from zero.
    """
    return {}

  def seek(self, state: Mapping[str, Any]) -> None:
    """Does nothing, likewise.

    Args:
      state: As `state` gave it.
    """

  def lines(self) -> list[str]:
    """Returns nothing: all that was read was said before the first step."""
    return []

  def _rows_of(self, step: int) -> list[list[int]]:
    """Returns the examples of each row; empty rows at the end are left out."""
    if step < 0:
      raise DataError(f'step {step} is negative; steps count from zero')
    epoch = self.epoch_of(step)
    self._load_epoch(epoch)
    first = (step - self._starts[epoch]) * self.batch_size
    return self._rows[first : first + self.batch_size]

  def _load_epoch(self, epoch: int) -> None:
    """Packs an epoch, and those before it whose length is not known."""
    for e in [*range(len(self._starts) - 1, epoch), epoch]:
      if e == self._epoch:
        continue
      self._epoch, self._rows = e, self._permuted_rows(e)
      if e == len(self._starts) - 1:
        steps = -(-len(self._rows) // self.batch_size)
        self._starts.append(self._starts[-1] + steps)

  def _permuted_rows(self, epoch: int) -> list[list[int]]:
    # The raw bits of Philox are the same in every NumPy, unlike a Generator's.
    bits = np.random.Philox(key=[self._seed, epoch])
    drawn = self._mixture.draw(self._seed, epoch)
    return shuffled_rows(
      self._lengths, drawn, bits, self.max_length, self._pack
    )


def shuffled_rows(
  lengths: np.ndarray,
  drawn: np.ndarray,
  bits: np.random.Philox,
  max_length: int,
  pack: bool,
) -> list[list[int]]:
  """Returns rows of examples, these and those in a random order.

  Args:
    lengths: Places that each example takes.
    drawn: Which of them are in the rows.
    bits: What decides the order.
    max_length: Places a row.
    pack: Whether examples share rows.
  """
  order = drawn[np.argsort(bits.random_raw(len(drawn)), kind='stable')]
  rows = _rows(lengths[order], max_length, pack)
  rows = [
    rows[i] for i in np.argsort(bits.random_raw(len(rows)), kind='stable')
  ]
  return [[int(order[i]) for i in row] for row in rows]


def _rows(
  lengths: np.ndarray, max_length: int, packed: bool
) -> list[list[int]]:
  """Returns the rows of examples in a given order."""
  rows = pack_rows(lengths.tolist(), max_length)
  return rows if packed else [[i] for i in range(len(lengths))]


def eval_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  max_length: int,
  pack: bool = True,
) -> list[Batch]:
  """Returns all examples in batches, packed once in a fixed order.

  Args:
    examples: The examples.
    batch_size: Rows a batch; the last batch is completed with empty rows,
      which have a zero mask.
    max_length: Places a row.
    pack: Whether examples share rows.
  """
  lengths = np.array([e.places for e in examples], int)
  rows = _rows(lengths, max_length, pack)
  return [
    make_batch(
      [[examples[i] for i in row] for row in rows[start : start + batch_size]],
      batch_size=batch_size,
      max_length=max_length,
    )
    for start in range(0, len(rows), batch_size)
  ]


def digest(examples: Sequence[Example]) -> str:
  """Returns the sha256 of all tokens and masks, in hexadecimal.

  Two sets of examples have the same digest exactly where tokens, masks and
  order agree; a resumed run compares it.
  """
  sha = hashlib.sha256()
  for example in examples:
    sha.update(len(example).to_bytes(8, 'little'))
    sha.update(example.tokens.astype('<i4').tobytes())
    sha.update(example.loss_mask.astype(np.uint8).tobytes())
  return sha.hexdigest()


def packing_efficiency(
  examples: Sequence[Example], *, max_length: int, pack: bool
) -> float:
  """Returns the share of places in rows that hold a token."""
  lengths = np.array([e.places for e in examples], int)
  rows = _rows(lengths, max_length, pack)
  return float(lengths.sum()) / (len(rows) * max_length)
