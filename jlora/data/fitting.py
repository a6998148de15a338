"""What happens to examples that are longer than a row."""

import dataclasses

from jlora.data.tokens import Example
from jlora.errors import DataError

TOO_LONG = ('cut', 'drop', 'error')


@dataclasses.dataclass(frozen=True)
class Fit:
  """What it took to fit examples into rows.

  Attributes:
    cut: Examples whose end was cut off.
    dropped: Examples left out, as too long or since cutting would leave
      nothing to learn.
    split: Plain texts that were split into several examples.
  """

  cut: int = 0
  dropped: int = 0
  split: int = 0

  def __add__(self, other: 'Fit') -> 'Fit':
    """Returns the counts of both."""
    return Fit(
      self.cut + other.cut,
      self.dropped + other.dropped,
      self.split + other.split,
    )


def fit(
  example: Example,
  *,
  is_text: bool,
  max_length: int,
  too_long: str = 'cut',
  where: str = '',
) -> tuple[list[Example], Fit]:
  """Makes an example fit into a row.

  A row of n places holds n + 1 tokens of an example, the last as a target.
  Plain text is split into windows that overlap by one token, so that every
  token is still learned once. Of a conversation the end is cut off, and where
  no learned token would be left, it is dropped; or `too_long` says otherwise.

  Args:
    example: At its full length.
    is_text: Whether it is plain text.
    max_length: Places in a row.
    too_long: What happens to a conversation longer than a row: 'cut', 'drop'
      or 'error'.
    where: What names its row in a message.

  Returns:
    What fits, and the counts.

  Raises:
    DataError: It is too long where that is an error.
  """
  long = example.places > max_length
  if long and not is_text and too_long == 'error':
    raise DataError(
      f'{where}: it takes {example.places} places, and a row has'
      f' data.max_length={max_length}; raise that, or set data.too_long to'
      " 'cut' or 'drop'"
    )
  left_out = long and not is_text and too_long == 'drop'
  pieces = [] if left_out else _pieces(example, max_length, is_text)
  cut = long and not is_text and bool(pieces)
  return pieces, Fit(int(cut), int(not pieces), int(long and is_text))


def require_kept(
  counts: Fit,
  examples: int,
  *,
  max_lost: float,
  max_length: int,
  longest: int,
  source: str = '',
) -> None:
  """Requires that examples did not lose too much.

  Args:
    counts: What it took to fit them.
    examples: How many they were.
    max_lost: The largest share that may be cut or dropped; below 1 some of
      them must be left.
    max_length: Places in a row.
    longest: Places of the longest.
    source: What they are of, for the message.

  Raises:
    DataError: They did.
  """
  lost = counts.cut + counts.dropped
  if counts.dropped == examples or lost > max_lost * examples:
    raise DataError(
      f'{source and source + ": "}{lost} of {examples} examples lose their'
      f' answer or its end at data.max_length={max_length}'
      f' ({counts.cut} cut, {counts.dropped}'
      f' dropped, at most {max_lost:.0%} may be); the longest takes {longest}'
      ' places: raise data.max_length, shorten the data, or leave them out with'
      " data.too_long='drop'"
    )


def _pieces(example: Example, max_length: int, text: bool) -> list[Example]:
  """Returns the parts of an example that are kept, each within a row."""
  if example.places <= max_length:
    starts, length = (0,), len(example)
  else:
    starts = range(0, example.places, max_length) if text else (0,)
    length = max_length + 1
  pieces = [_window(example, start, length) for start in starts]
  return [piece for piece in pieces if piece.places]


def _window(example: Example, start: int, length: int) -> Example:
  mask = example.loss_mask[start : start + length].copy()
  mask[:1] = False
  return Example(example.tokens[start : start + length], mask)
