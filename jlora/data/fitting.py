"""What happens to examples that are longer than a row."""

import dataclasses
from collections.abc import Sequence

from jlora.data.tokens import Example
from jlora.errors import DataError


@dataclasses.dataclass(frozen=True)
class Fit:
  """What it took to fit examples into rows.

  Attributes:
    cut: Examples whose end was cut off.
    dropped: Examples left out, since cutting would leave nothing to learn.
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
) -> tuple[list[Example], Fit]:
  """Makes every example fit into a row.

  A row of n places holds n + 1 tokens of an example, the last as a target.
  Plain text is split into windows that overlap by one token, so that every
  token is still learned once. Of a conversation the end is cut off; where no
  learned token would be left, it is dropped.

  Args:
    examples: Examples at their full length.
    is_text: Of each, whether it is plain text.
    max_length: Places in a row.
    max_lost: The largest share of examples that may be cut or dropped.

  Returns:
    The examples that fit, in order, and the counts.

  Raises:
    DataError: There is nothing left, or more than `max_lost` is lost.
  """
  fitted: list[Example] = []
  cut = dropped = split = 0
  for example, text in zip(examples, is_text, strict=True):
    pieces = _pieces(example, max_length, text)
    long = example.places > max_length
    split += long and text
    cut += long and not text and bool(pieces)
    dropped += not pieces
    fitted += pieces
  lost, n = cut + dropped, len(examples)
  if not fitted or lost > max_lost * n:
    longest = max((example.places for example in examples), default=0)
    raise DataError(
      f'{lost} of {n} examples lose their answer or its end at'
      f' data.max_length={max_length} ({cut} cut, {dropped} dropped, at most'
      f' {max_lost:.0%} may be); the longest takes {longest} places: raise'
      ' data.max_length or shorten the data'
    )
  return fitted, Fit(cut, dropped, split)


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
