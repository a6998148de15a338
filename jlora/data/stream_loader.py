"""Batches of data that is larger than memory, in an order that can be resumed.

Examples come in blocks: so many are taken from the sources by their weights,
shuffled and packed. A block depends on the seed, its number and where each
source stood, and on nothing before; so a run goes on from a place in a block,
and the rows before it are not tokenized again.
"""

import bisect
import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from jlora.data.batch import Batch
from jlora.data.loader import shuffled_rows
from jlora.data.packing import make_batch
from jlora.data.streams import SourceStream
from jlora.data.tokens import Example
from jlora.errors import DataError


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a block begins.

  Attributes:
    step: Its first step.
    block: Its number.
    taken: Examples taken of each source before it.
    positions: Where each source stands.
  """

  step: int
  block: int
  taken: tuple[int, ...]
  positions: tuple[tuple[int, int], ...]

  @classmethod
  def read(cls, record: Mapping[str, Any]) -> 'Place':
    """Returns the place that a checkpoint's record holds.

    Args:
      record: The fields as JSON values.
    """
    return cls(
      record['step'],
      record['block'],
      tuple(record['taken']),
      tuple((row, piece) for row, piece in record['positions']),
    )


@dataclasses.dataclass(frozen=True)
class _Block:
  """Examples, the rows of each step, and where the block begins and ends."""

  place: Place
  after: Place
  examples: list[Example]
  batches: list[list[list[int]]]


class StreamLoader:
  """Gives the batch of any step; going on to the next step is cheap.

  While the steps of a block are made, a thread makes the next block.

  The rows of a block are spread evenly over its steps, so that none is nearly
  empty; rows that are missing in a batch stay empty.

  Attributes:
    batch_size: Rows a batch.
    max_length: Places a row.
  """

  def __init__(
    self,
    streams: Sequence[SourceStream],
    shares: Sequence[float],
    *,
    batch_size: int,
    max_length: int,
    buffer: int,
    pack: bool = True,
    seed: int = 0,
  ):
    """Reads nothing yet.

    Args:
      streams: One a source.
      shares: Of the examples, one a source.
      batch_size: Rows a batch.
      max_length: Places a row.
      buffer: Examples a block.
      pack: Whether examples share rows.
      seed: Which order.
    """
    self.batch_size, self.max_length = batch_size, max_length
    self._streams, self._shares = streams, shares
    self._buffer, self._pack, self._seed = buffer, pack, seed
    nowhere = tuple(0 for _ in streams)
    origin = Place(0, 0, nowhere, tuple((0, 0) for _ in streams))
    self._places = [origin]  # of the blocks that are known, ascending
    self._block: _Block | None = None
    self._ahead: tuple[Place, futures.Future[_Block]] | None = None

  def batch(self, step: int, rows: slice = slice(None)) -> Batch:
    """Returns the batch of a step, or some of its rows.

    Args:
      step: Counts from zero.
      rows: Of the batch; no other row is made.

    Returns:
      NumPy arrays, [rows, max_length] each.

    Raises:
      DataError: The step is negative, or a row of the data is malformed.
    """
    wanted = range(self.batch_size)[rows]
    return make_batch(
      self._rows_of(step)[rows],
      batch_size=len(wanted),
      max_length=self.max_length,
    )

  def tokens_in(self, step: int) -> int:
    """Returns the places of a step's batch that hold a token.

    Args:
      step: Counts from zero.
    """
    return sum(e.places for row in self._rows_of(step) for e in row)

  def first_block(self) -> list[Example]:
    """Returns the examples of the first block, in the order of the sources."""
    self._load(self._places[0])
    return self._block.examples

  def filled(self) -> tuple[float, float]:
    """Returns the rows a step of the block at hand, and their filled places.

    These are a share of all places of a batch, of empty rows too.
    """
    batches = self._block.batches
    rows = sum(map(len, batches)) / len(batches)
    places = len(batches) * self.batch_size * self.max_length
    return rows, sum(e.places for e in self._block.examples) / places

  def state(self, step: int) -> dict[str, Any]:
    """Returns what `seek` needs to go on with a step, as JSON values.

    Args:
      step: One that was reached, or that after it.
    """
    return dataclasses.asdict(self._place_of(step))

  def seek(self, state: Mapping[str, Any]) -> None:
    """Makes steps from a place on known, without reading what is before it.

    Args:
      state: As `state` gave it.
    """
    if not state:  # of a run that began before it was streamed
      return
    place = Place.read(state)
    if len(place.positions) != len(self._streams):
      raise DataError(
        f'this run stood in {len(place.positions)} sources, and now there are'
        f' {len(self._streams)}; restore data.train'
      )
    if place not in self._places:
      bisect.insort(self._places, place, key=lambda known: known.step)

  def lines(self) -> list[str]:
    """Returns what was read since the start of the process, for people."""
    return [stream.line() for stream in self._streams]

  def _place_of(self, step: int) -> Place:
    """Returns the last known place at or before a step."""
    at = bisect.bisect_right(self._places, step, key=lambda place: place.step)
    return self._places[at - 1]

  def _rows_of(self, step: int) -> list[list[Example]]:
    if step < 0:
      raise DataError(f'step {step} is negative; steps count from zero')
    self._load(self._place_of(step))
    while step >= self._block.after.step:
      self._load(self._block.after)
    if self._ahead is None:
      self._ahead = self._block.after, _in_thread(self._make, self._block.after)
    rows = self._block.batches[step - self._block.place.step]
    return [[self._block.examples[i] for i in row] for row in rows]

  def _load(self, place: Place) -> None:
    """Makes a block the current one."""
    if self._block is not None and self._block.place == place:
      return
    ahead, self._ahead = self._ahead, None
    if ahead is not None:
      futures.wait([ahead[1]])  # it moves the sources
    made = ahead is not None and ahead[0] == place
    self._block = ahead[1].result() if made else self._make(place)
    if place.block:  # of the first, the report tells
      self._warn_of_lost()
    if self._block.after not in self._places:
      bisect.insort(
        self._places, self._block.after, key=lambda known: known.step
      )

  def _warn_of_lost(self) -> None:
    """Warns of what a block lost, once nothing reads the sources."""
    for said in filter(None, [stream.lost() for stream in self._streams]):
      warnings.warn(said, stacklevel=2)

  def _make(self, place: Place) -> _Block:
    """Takes, shuffles and packs the examples of a block."""
    for stream, position in zip(self._streams, place.positions, strict=True):
      stream.seek(position)
    taken = list(place.taken)
    examples = []
    while len(examples) < self._buffer:
      if not threading.main_thread().is_alive():
        raise DataError('the process ended while it read ahead')
      examples.append(self._take(taken))
    rows = shuffled_rows(
      np.array([example.places for example in examples]),
      np.arange(self._buffer),
      np.random.Philox(key=[self._seed, place.block]),
      self.max_length,
      self._pack,
    )
    batches = _spread(rows, self.batch_size)
    after = Place(
      place.step + len(batches),
      place.block + 1,
      tuple(taken),
      tuple(stream.position for stream in self._streams),
    )
    return _Block(place, after, examples, batches)

  def _take(self, taken: list[int]) -> Example:
    """Takes an example of the source that is furthest behind its share."""
    total = sum(taken) + 1
    behind = [
      share * total - n for share, n in zip(self._shares, taken, strict=True)
    ]
    source = behind.index(max(behind))
    taken[source] += 1
    return self._streams[source].take()


def _in_thread(
  make: Callable[[Place], _Block], place: Place
) -> futures.Future[_Block]:
  """Makes a block in a thread that ends soon after the main thread does.

  A process would wait for that of an executor, however large the block is.
  """
  future: futures.Future[_Block] = futures.Future()

  def run() -> None:
    try:
      future.set_result(make(place))
    except Exception as error:  # whoever asks for the block gets it
      future.set_exception(error)
    finally:  # nobody waits for ever
      if not future.done():
        future.set_exception(RuntimeError('reading ahead failed'))

  threading.Thread(target=run, name='next block').start()
  return future


def _spread(rows: list[list[int]], batch_size: int) -> list[list[list[int]]]:
  """Returns rows in as few batches as hold them, all about equally full."""
  n = -(-len(rows) // batch_size)
  borders = [i * len(rows) // n for i in range(n + 1)]
  return [rows[a:b] for a, b in itertools.pairwise(borders)]
