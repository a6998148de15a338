"""How conversations become examples that fit into rows."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jlora.data.conversations import Conversation
from jlora.data.fitting import Fit, fit, require_kept
from jlora.data.thinking import without_thinking
from jlora.data.tokens import Example, tokenize

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast as Tokenizer
else:
  Tokenizer = Any


@dataclasses.dataclass(frozen=True)
class Made:
  """Examples made of conversations, and what it took.

  Attributes:
    examples: Each within a row.
    whole: How many they were at their full length.
    longest: Places of the longest of these.
    fit: What was cut, dropped and split.
    divided: Conversations made into several examples by the template.
    thoughts: Turns from which what is thought was dropped.
  """

  examples: list[Example] = dataclasses.field(default_factory=list)
  whole: int = 0
  longest: int = 0
  fit: Fit = dataclasses.field(default_factory=Fit)
  divided: int = 0
  thoughts: int = 0

  def __add__(self, other: 'Made') -> 'Made':
    """Returns the examples and counts of both."""
    return Made(
      self.examples + other.examples,
      self.whole + other.whole,
      max(self.longest, other.longest),
      self.fit + other.fit,
      self.divided + other.divided,
      self.thoughts + other.thoughts,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """What is learned of a conversation, and within which length.

  Attributes:
    tokenizer: The base's tokenizer, with its chat template.
    max_length: Places in a row.
    learn: See `tokens.tokenize`.
    thinking: 'keep' or 'drop': what is thought before an answer.
    template: Pairs of a field and a value that the chat template gets.
    too_long: See `fitting.fit`.
    max_lost: The largest share of examples that 'cut' may take tokens from.
    vocab_size: Rows of the base's embedding; None does not check ids.
  """

  tokenizer: Tokenizer
  max_length: int
  learn: str = 'completions'
  thinking: str = 'keep'
  template: tuple[tuple[str, Any], ...] = ()
  too_long: str = 'cut'
  max_lost: float = 0.1
  vocab_size: int | None = None

  def make(self, conversation: Conversation) -> Made:
    """Returns the examples of a conversation, maybe none.

    Args:
      conversation: As it was read.

    Raises:
      DataError: It cannot be tokenized, or is too long where that is an error.
    """
    conversation, thoughts = self.prepared(conversation)
    whole = tokenize(
      conversation,
      self.tokenizer,
      learn=self.learn,
      vocab_size=self.vocab_size,
    )
    fitted = [self._fit(example, conversation) for example in whole]
    return Made(
      [piece for pieces, _ in fitted for piece in pieces],
      len(whole),
      max(example.places for example in whole),
      sum((counts for _, counts in fitted), Fit()),
      int(len(whole) > 1),
      thoughts,
    )

  def _fit(
    self, example: Example, conversation: Conversation
  ) -> tuple[list[Example], Fit]:
    return fit(
      example,
      is_text=conversation.is_text,
      max_length=self.max_length,
      too_long=self.too_long,
      where=conversation.where,
    )

  def make_all(
    self, conversations: Iterable[Conversation], source: str = ''
  ) -> Made:
    """Returns examples in the order of their conversations.

    Args:
      conversations: At least one.
      source: What they are of, for messages.

    Raises:
      DataError: As `make` does, or nothing is left of them, or too much of
        them is longer than a row.
    """
    made = [self.make(conversation) for conversation in conversations]
    counts = sum((dataclasses.replace(m, examples=[]) for m in made), Made())
    self.require_kept(counts, source)
    examples = [example for each in made for example in each.examples]
    return dataclasses.replace(counts, examples=examples)

  def require_kept(self, made: Made, source: str = '') -> None:
    """Requires that examples did not lose too much.

    Args:
      made: The examples.
      source: What they are of, for the message.

    Raises:
      DataError: They did.
    """
    require_kept(
      made.fit,
      made.whole,
      max_lost=self.max_lost if self.too_long == 'cut' else 1.0,
      max_length=self.max_length,
      longest=made.longest,
      source=source,
    )

  def prepared(self, conversation: Conversation) -> tuple[Conversation, int]:
    """Returns a conversation as it is learned, and turns that lost thoughts.

    Args:
      conversation: As it was read.
    """
    template = dict(self.template)
    conversation = dataclasses.replace(conversation, template=template)
    if self.thinking == 'keep':
      return conversation, 0
    return without_thinking(conversation)
