"""What happens to examples that are longer than a row."""

import dataclasses
from collections.abc import Sequence

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


def fit(
  examples: Sequence[Example],
  is_text: Sequence[bool],
  *,
  max_length: int,
  max_lost: float = 0.1,
  too_long: str = 'cut',
  where: Sequence[str] = (),
) -> tuple[list[Example], Fit]:
  """Makes every example fit into a row.

  A row of n places holds n + 1 tokens of an example, the last as a target.
  Plain text is split into windows that overlap by one token, so that every
  token is still learned once. Of a conversation the end is cut off, and where
  no learned token would be left, it is dropped; or `too_long` says otherwise.

  Args:
    examples: Examples at their full length.
    is_text: Of each, whether it is plain text.
    max_length: Places in a row.
    max_lost: The largest share of examples that may lose tokens with 'cut'.
    too_long: What happens to conversations longer than a row: 'cut', 'drop'
      (however many they are) or 'error'.
    where: Of each example, what names its row in a message.

  Returns:
    The examples that fit, in order, and the counts.

  Raises:
    DataError: There is nothing left, more than `max_lost` is lost, or one is
      too long where that is an error.
  """
  if too_long == 'error':
    _require_short(examples, is_text, max_length, where)
  fitted: list[Example] = []
  cut = dropped = split = 0
  for example, text in zip(examples, is_text, strict=True):
    long = example.places > max_length
    left_out = long and not text and too_long == 'drop'
    pieces = [] if left_out else _pieces(example, max_length, text)
    split += long and text
    cut += long and not text and bool(pieces)
    dropped += not pieces
    fitted += pieces
  lost, n = cut + dropped, len(examples)
  if not fitted or (too_long == 'cut' and lost > max_lost * n):
    longest = max((example.places for example in examples), default=0)
    raise DataError(
      f'{lost} of {n} examples lose their answer or its end at'
      f' data.max_length={max_length} ({cut} cut, {dropped} dropped, at most'
      f' {max_lost:.0%} may be); the longest takes {longest} places: raise'
      ' data.max_length, shorten the data, or leave them out with'
      " data.too_long='drop'"
    )
  return fitted, Fit(cut, dropped, split)


def _require_short(
  examples: Sequence[Example],
  is_text: Sequence[bool],
  max_length: int,
  where: Sequence[str],
) -> None:
  """Refuses the first conversation that is longer than a row."""
  for i, (example, text) in enumerate(zip(examples, is_text, strict=True)):
    if example.places > max_length and not text:
      name = where[i] if where else f'example {i}'
      raise DataError(
        f'{name}: it takes {example.places} places, and a row has'
        f' data.max_length={max_length}; raise that, or set data.too_long to'
        " 'cut' or 'drop'"
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
