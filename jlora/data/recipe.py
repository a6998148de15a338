"""How conversations become examples that fit into rows."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jlora.data.conversations import Conversation
from jlora.data.fitting import Fit, fit
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
    fit: What was cut, dropped and split.
    divided: Conversations made into several examples by the template.
    thoughts: Turns from which what is thought was dropped.
  """

  examples: list[Example]
  fit: Fit
  divided: int
  thoughts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """What is learned of a conversation, and within which length.

  Attributes:
    tokenizer: The base's tokenizer, with its chat template.
    max_length: Places in a row.
    learn: See `tokens.tokenize`.
    thinking: 'keep' or 'drop': what is thought before an answer.
    too_long: See `fitting.fit`.
    max_lost: Likewise.
    vocab_size: Rows of the base's embedding; None does not check ids.
  """

  tokenizer: Tokenizer
  max_length: int
  learn: str = 'completions'
  thinking: str = 'keep'
  too_long: str = 'cut'
  max_lost: float = 0.1
  vocab_size: int | None = None

  def make(self, conversations: Sequence[Conversation]) -> Made:
    """Returns examples in the order of their conversations.

    Args:
      conversations: At least one.

    Raises:
      DataError: One cannot be tokenized, or too much of them is longer than a
        row.
    """
    conversations, thoughts = self.prepared(conversations)
    made = [
      tokenize(
        conversation,
        self.tokenizer,
        learn=self.learn,
        vocab_size=self.vocab_size,
      )
      for conversation in conversations
    ]
    pairs = list(zip(conversations, made, strict=True))
    fitted, counts = fit(
      [example for examples in made for example in examples],
      [c.is_text for c, examples in pairs for _ in examples],
      where=[c.where for c, examples in pairs for _ in examples],
      max_length=self.max_length,
      max_lost=self.max_lost,
      too_long=self.too_long,
    )
    divided = sum(len(examples) > 1 for examples in made)
    return Made(fitted, counts, divided, thoughts)

  def prepared(
    self, conversations: Sequence[Conversation]
  ) -> tuple[list[Conversation], int]:
    """Returns conversations as they are learned, and turns that lost thoughts.

    Args:
      conversations: As they were read.
    """
    if self.thinking == 'keep':
      return list(conversations), 0
    return without_thinking(conversations)
