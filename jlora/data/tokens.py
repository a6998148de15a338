"""Conversations as tokens, with a mask of those that are learned.

The mask comes from rendering prefixes. Let P be the conversation before a turn
with the header of the answer, and F the conversation up to the turn's end:
what F adds to P is what the model has to say, and P is exactly what it is
given when it answers.

Some templates write a turn differently once more follow: Qwen3's leaves out
what was thought, Mistral's moves the system turn to the last question. F is
then no beginning of the whole, and such an answer becomes an example of its
own, which ends with it.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.data.conversations import Conversation
from jlora.data.templates import (
  check_written,
  is_closed,
  render,
  said_in,
  special_tokens,
)
from jlora.errors import DataError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast as Tokenizer
else:
  Tokenizer = Any

LEARN = ('completions', 'last', 'all')


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """A tokenized conversation.

  Attributes:
    tokens: int32 [n].
    loss_mask: bool [n]; whether the model learns to say the token. Never true
      of the first, before which there is nothing.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray

  def __len__(self) -> int:
    """Returns the number of tokens."""
    return len(self.tokens)

  @property
  def places(self) -> int:
    """The places it takes in a row.

    The last learned token is a target only, and nothing after it can change
    the loss: neither takes a place. 0 where nothing is learned.
    """
    return int(np.flatnonzero(self.loss_mask).max(initial=0))


def tokenize(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  learn: str = 'completions',
  vocab_size: int | None = None,
) -> list[Example]:
  """Returns a conversation as tokens, at its full length.

  A trained turn is learned up to and with the token that ends it. The template
  alone decides about a beginning-of-sequence token, so there is never a second
  one. Plain text gets what the tokenizer adds to text, and an end.

  Args:
    conversation: What to tokenize.
    tokenizer: A fast tokenizer of transformers, with its chat template.
    learn: 'completions', every trained turn; 'last', the last of them; or
      'all', whatever the template writes.
    vocab_size: Rows of the embedding; None does not check the ids.

  Returns:
    One example, or several where the template rewrites earlier turns.

  Raises:
    DataError: There is no chat template, it refuses the conversation, leaves
      something out or opens answers with what they do not begin with, nothing
      ends a turn, or an id has no row.
  """
  if conversation.is_text:
    tokens = _encode(conversation.reference, tokenizer, special=True)
    tokens = _with_end(tokens, tokenizer)
    pairs = [(tokens, np.ones(len(tokens), bool))]
  elif learn == 'all':
    pairs = [_learn_all(conversation, tokenizer)]
  else:
    last_only = learn == 'last'
    pairs = _learn_turns(conversation, tokenizer, last_only=last_only)
  for tokens, mask in pairs:
    mask[:1] = False
    if vocab_size is not None and tokens.max(initial=0) >= vocab_size:
      raise DataError(
        f'token id {tokens.max()} has no row in the embedding of {vocab_size}'
        ' rows; use the tokenizer that belongs to the base'
      )
  return [Example(tokens, mask) for tokens, mask in pairs]


def prompt_tokens(
  conversation: Conversation, tokenizer: Tokenizer
) -> np.ndarray:
  """Returns what the model is given before it says the last turn.

  Args:
    conversation: A conversation that ends with the turn to be answered.
    tokenizer: As in `tokenize`.

  Returns:
    int32 [n], with the header of the answer: a prefix of what `tokenize`
    returns, unless a token joins the header and the answer.

  Raises:
    DataError: It is plain text, or the template refuses it.
  """
  if conversation.is_text:
    raise DataError(
      f'plain text {conversation.reference[:40]!r} has no prompt; generate from'
      ' rows with questions'
    )
  text = render(conversation, conversation.prompt, tokenizer, header=True)
  return _encode(text, tokenizer)


def _learn_all(
  conversation: Conversation, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  check_written(conversation, tokenizer)
  if any(message.muted for message in conversation.messages):
    raise DataError(
      f"{conversation.where}: a turn has weight 0, and data.learn='all' learns"
      " every turn; set data.learn='completions', or leave the weights out"
    )
  text = render(conversation, conversation.messages, tokenizer)
  tokens = _encode(text, tokenizer)
  if not is_closed(text, tokenizer):
    tokens = _with_end(tokens, tokenizer)
  return tokens, np.ones(len(tokens), bool)


def _learn_turns(
  conversation: Conversation, tokenizer: Tokenizer, *, last_only: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns tokens and masks, as few examples as the template allows."""
  check_written(conversation, tokenizer)
  messages = conversation.messages
  whole = render(conversation, messages, tokenizer)
  left = [k for k, message in enumerate(messages) if message.trained]
  left = left[-1:] if last_only else left
  turns = {k: _Turn.of(conversation, k, tokenizer, whole) for k in left}
  made, count = [], len(messages)
  while left:
    here = [k for k in left if whole.startswith(turns[k].said)]
    if here:
      ended = messages[count - 1].trained and here[-1] == count - 1
      pair = _mask([turns[k] for k in here], whole, tokenizer, ended)
      made.append(pair)
    left = [k for k in left if k not in here]
    if left:
      count = left[-1] + 1
      whole = turns[left[-1]].said
  return made[::-1]


@dataclasses.dataclass(frozen=True)
class _Turn:
  """A turn to learn: the text before it, with its header, and up to its end."""

  given: str
  said: str

  @classmethod
  def of(
    cls, conversation: Conversation, k: int, tokenizer: Tokenizer, whole: str
  ) -> '_Turn':
    messages = conversation.messages
    given = render(conversation, messages[:k], tokenizer, header=True)
    said = whole
    if k < len(messages) - 1:
      said = render(conversation, messages[: k + 1], tokenizer)
    said = said_in(said, tokenizer)
    if not said.startswith(given):
      answer = _after(given, said, messages[k - 1].content.strip())
      if answer is None:
        where = f'{conversation.where}: ' if conversation.where else ''
        raise DataError(
          f'{where}the chat template opens an answer with {given[-30:]!r}, but'
          f' turn {k + 1} of {len(messages)} does not begin with that, so what'
          ' was said there cannot be told apart; use another template'
        )
      said = given + answer
    return cls(given, said)


def _after(given: str, said: str, question: str) -> str | None:
  """Returns what is said after a question that is written differently before.

  Mistral's template has the system turn in the last question, and leaves it
  out once that is answered. From the question on, both are the same.
  """
  end = given[given.rfind(question) :] if question else ''
  _, found, answer = said.rpartition(end) if end else ('', '', '')
  return answer if found else None


def _mask(
  turns: list[_Turn], whole: str, tokenizer: Tokenizer, ended: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns a text as tokens, and which of them turns of it say.

  `ended` is whether the last of the turns is the end of the text.
  """
  tokens = _encode(whole, tokenizer)
  mask = np.zeros(len(tokens), bool)
  ends = special_tokens(tokenizer)[0]
  for turn in turns:
    start = _common(_encode(turn.given, tokenizer), tokens)
    stop = len(tokens)
    if turn.said != whole:
      stop = _common(_encode(turn.said, tokenizer), tokens)
    mask[start : _turn_end(tokens, start, stop, ends)] = True
  if ended and not (mask.any() and _last(tokens, mask) in ends):
    return _close(tokens, mask, tokenizer)
  return tokens, mask


def _turn_end(
  tokens: np.ndarray, start: int, stop: int, ends: frozenset[int]
) -> int:
  """Returns the place after the token that ends a turn.

  What follows it, such as the line break of ChatML, the model never says.
  """
  for place in range(stop - 1, start - 1, -1):
    if tokens[place] in ends:
      return place + 1
  return stop


def _close(
  tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  """Ends a last turn that the template leaves open, and learns the end."""
  closed = _with_end(tokens, tokenizer)
  return closed, np.pad(
    mask, (0, len(closed) - len(tokens)), constant_values=True
  )


def _last(tokens: np.ndarray, mask: np.ndarray) -> int:
  return int(tokens[np.flatnonzero(mask)[-1]])


def _with_end(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  end = tokenizer.eos_token_id
  if end is None:
    raise DataError(
      "the base's tokenizer has no end-of-sequence token, so a model could not"
      ' learn to stop; set eos_token in tokenizer_config.json'
    )
  if len(tokens) and tokens[-1] == end:
    return tokens
  return np.append(tokens, np.int32(end))


def _common(a: np.ndarray, b: np.ndarray) -> int:
  """Returns the length of the longest common prefix."""
  n = min(len(a), len(b))
  different = np.flatnonzero(a[:n] != b[:n])
  return int(different[0]) if len(different) else n


def _encode(
  text: str, tokenizer: Tokenizer, *, special: bool = False
) -> np.ndarray:
  ids = tokenizer(text, add_special_tokens=special)['input_ids']
  return np.asarray(ids, np.int32)
