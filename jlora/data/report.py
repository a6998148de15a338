"""What was made of the data: counters, and two examples to look at."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.console
import rich.text

from jlora.data.tokens import Example

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast as Tokenizer
else:
  Tokenizer = Any

TRAINED, UNTRAINED = 'bold green', 'dim'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataReport:
  """Counts of the data that a run reads.

  Attributes:
    examples: Examples trained on.
    eval_examples: Examples held out.
    tokens: Tokens of the examples trained on.
    trained_tokens: How many of them are learned.
    packing_efficiency: Share of the places in rows that hold a token.
    cut: Examples whose end was cut off, training and held out together.
    dropped: Examples left out as too long, likewise.
    split: Plain texts that were split over several examples, likewise.
    divided: Conversations made into several examples, since the chat template
      rewrites earlier turns, likewise.
    thoughts: Turns from which what is thought was dropped, likewise.
    duplicates: Held-out examples dropped since training has their prompt.
    notes: What was decided about the sources, a sentence each.
  """

  examples: int
  eval_examples: int
  tokens: int
  trained_tokens: int
  packing_efficiency: float
  cut: int
  dropped: int
  split: int
  duplicates: int
  divided: int = 0
  thoughts: int = 0
  notes: tuple[str, ...] = ()

  @property
  def share_trained(self) -> float:
    """Share of the tokens that are learned."""
    return self.trained_tokens / self.tokens

  def lines(self) -> list[str]:
    """Returns the notes and the counters as text."""
    return [
      *self.notes,
      f'{self.examples:,} examples, {self.tokens:,} tokens,'
      f' {self.share_trained:.1%} of them trained;'
      f' {self.packing_efficiency:.1%} of the places in rows are filled',
      f'{self.eval_examples:,} held out; {self.duplicates:,} more dropped'
      ' whose prompt occurs in training',
      f'{self.cut:,} cut at the end, {self.dropped:,} dropped as too long,'
      f' {self.split:,} texts split',
      *self._changes(),
    ]

  def _changes(self) -> Iterator[str]:
    if self.divided:
      yield (
        f'{self.divided:,} conversations divided, an example for each answer'
        ' that the chat template writes differently once more follows'
      )
    if self.thoughts:
      yield f'what is thought is dropped from {self.thoughts:,} turns'


def show_examples(
  examples: Sequence[Example],
  tokenizer: Tokenizer,
  report: DataReport,
  console: rich.console.Console,
  *,
  number: int = 2,
) -> None:
  """Prints the first examples, what is trained in color, and the counters.

  Args:
    examples: The examples trained on.
    tokenizer: The tokenizer that made them.
    report: The counters.
    console: Where to print.
    number: How many examples to print.
  """
  trained = rich.text.Text('trained', TRAINED)
  untrained = rich.text.Text('given', UNTRAINED)
  console.print(rich.text.Text.assemble(trained, ' / ', untrained))
  for example in examples[:number]:
    console.print(colored(example, tokenizer))
    console.rule(style=UNTRAINED)
  for line in report.lines():
    console.print(rich.text.Text(line))


def colored(example: Example, tokenizer: Tokenizer) -> rich.text.Text:
  """Returns the text of an example, trained and untrained told apart."""
  borders = np.flatnonzero(np.diff(example.loss_mask)) + 1
  text = rich.text.Text()
  for run in np.split(np.arange(len(example)), borders):
    text.append(
      tokenizer.decode(
        example.tokens[run].tolist(), clean_up_tokenization_spaces=False
      ),
      TRAINED if example.loss_mask[run[0]] else UNTRAINED,
    )
  return text
