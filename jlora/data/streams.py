"""Sources that are read while a run trains, round and round."""

import collections
import itertools
from collections.abc import Collection, Iterator

from jlora.data.conversations import Conversation
from jlora.data.recipe import Made, Recipe
from jlora.data.rows import Columns, RowReader
from jlora.data.sources import draw_conversations, is_task, open_rows
from jlora.data.tokens import Example
from jlora.errors import DataError

_BARREN = 10_000  # rows without an example before a source is given up


class SourceStream:
  """The examples of one source in its own order, without end.

  After its last row it begins anew. Where it stands is a row and, of a text
  that makes several examples, a piece: rows before it are read again to get
  there, but not tokenized.

  Attributes:
    source: Its name.
    made: What it took to make the examples so far; holds none of them.
    rounds: How often it has come to its end.
    duplicates: Rows passed over so far, since they are held out.
  """

  def __init__(
    self,
    source: str,
    recipe: Recipe,
    *,
    columns: Columns = (),
    seed: int = 0,
    skip: int = 0,
    limit: int | None = None,
    held_out: Collection[str] = (),
  ):
    """Opens nothing yet.

    Args:
      source: As in `sources.check_source`.
      recipe: How rows become examples.
      columns: Pairs of a field and the column that holds it.
      seed: Which stream of a task's training questions.
      skip: Rows at its start that are not trained on.
      limit: Rows to read after these; None is all.
      held_out: Prompts that are passed over, see `Conversation.prompt_key`.
    """
    self.source = source
    self.made = Made()
    self.rounds = self.duplicates = 0
    self._told = Made()  # what `lost` has looked at
    self._recipe, self._seed = recipe, seed
    self._reader = RowReader(source, columns)
    self._skip, self._held_out = skip, held_out
    self._stop = None if limit is None else skip + limit
    self._pending: collections.deque[Example] = collections.deque()
    self._rows: Iterator[Conversation] = iter(())
    self._row = self._piece = -1  # nowhere

  @property
  def position(self) -> tuple[int, int]:
    """The next example: its row, and which of its pieces."""
    return max(self._row, 0), max(self._piece, 0)

  def seek(self, position: tuple[int, int]) -> None:
    """Goes to a position.

    Args:
      position: As the property gave it.

    Raises:
      DataError: The source has fewer rows now.
    """
    if (self._row, self._piece) == position:
      return
    self._row, piece = position
    self._pending.clear()
    self._rows = self._open(self._row)
    if piece and not self._fill():
      raise self._gone(self._row)
    for _ in range(piece):
      self._pending.popleft()
    self._piece = piece

  def take(self) -> Example:
    """Returns the next example.

    Raises:
      DataError: A row is malformed, or a whole round gives no example.
    """
    if self._row < 0:
      self.seek((0, 0))
    barren = ends = 0
    while not self._pending:
      if self._fill():
        barren += 1
        self._row += not self._pending  # a row without an example
      else:
        ends += 1
        self.rounds += 1
        self._row, self._rows = 0, self._open(0)
      if ends > 1 or barren > _BARREN:
        raise DataError(
          f'{self.source!r} gives no example to train on (rows held out:'
          f' {self._skip}, examples too long: {self.made.fit.dropped}); give'
          ' more rows, lower data.eval_examples, or raise data.max_length'
        )
    example = self._pending.popleft()
    self._piece += 1
    if not self._pending:
      self._row, self._piece = self._row + 1, 0
    return example

  def _fill(self) -> bool:
    """Makes the examples of one row, maybe none; False at the end."""
    try:
      conversation = next(self._rows, None)
      if conversation is None:
        return False
      self._piece = 0
      if conversation.prompt_key() in self._held_out:
        self.duplicates += 1
        return True
      made = self._recipe.make(conversation)
    except DataError:
      self._row = -1  # nowhere; what is read next is looked up anew
      raise
    self._pending.extend(made.examples)
    self.made += Made(
      [], made.whole, made.longest, made.fit, made.divided, made.thoughts
    )
    return True

  def _open(self, start: int) -> Iterator[Conversation]:
    """Yields rows from one on; the first row decides their format."""
    start += self._skip
    if is_task(self.source):
      drawn = draw_conversations(self.source, split='train', seed=self._seed)
      yield from itertools.islice(drawn, start, self._stop)
      return
    rows = self._reader.filled(
      open_rows(self.source, split='train', stream=True)
    )
    count = 0
    for i, row in enumerate(itertools.islice(rows, self._stop)):
      count += 1
      if i == 0 or i >= start:
        conversation = self._reader.read(*row)
      if i >= start:
        yield conversation
    if count < start:
      raise self._gone(start - self._skip)

  def _gone(self, row: int) -> DataError:
    return DataError(
      f'{self.source!r} has no row {row} any more, where this run stood;'
      ' restore the data'
    )

  def check_seen(self) -> None:
    """Requires that some row so far had each column that is named.

    Raises:
      DataError: None had one.
    """
    self._reader.check_seen()

  def lost(self) -> str:
    """Says what was cut and dropped since it was last asked, if it is much."""
    before, self._told = self._told, self.made
    fit, max_length = self.made.fit, self._recipe.max_length
    n = self.made.whole - before.whole
    lost = fit.cut + fit.dropped - before.fit.cut - before.fit.dropped
    if self._recipe.too_long != 'cut' or lost <= n * self._recipe.max_lost:
      return ''
    return (
      f'{self.source}: {lost:,} of {n:,} examples of a block ({lost / n:.0%})'
      f' lose their answer or its end at data.max_length={max_length}; raise'
      " that, or leave them out with data.too_long='drop'"
    )

  def line(self) -> str:
    """Returns what was read so far, for people to read."""
    fit = self.made.fit
    return (
      f'{self.source}: read {self.made.whole:,} examples, {self.rounds:,}'
      f' rounds ended; {fit.cut:,} cut, {fit.dropped:,} dropped as too'
      f' long, {fit.split:,} texts split, {self.duplicates:,} left out as held'
      f' out{self._reader.unread()}'
    )
