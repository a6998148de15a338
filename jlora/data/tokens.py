"""Conversations as tokens, with a mask of those that are learned.

The mask comes from rendering prefixes. Let P be the conversation before a turn
with the header of the answer, and F the conversation up to the turn's end:
what F adds to P is what the model has to say, and P is exactly what it is
given when it answers.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from jlora.data.conversations import Conversation, Message
from jlora.errors import DataError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast as Tokenizer
else:
  Tokenizer = Any


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


def check_template(tokenizer: Tokenizer) -> None:
  """Requires a chat template.

  Raises:
    DataError: The tokenizer has none.
  """
  if not getattr(tokenizer, 'chat_template', None):
    raise DataError(
      "the base's tokenizer has no chat template; use a base that was tuned for"
      " chat, or rows of 'text'"
    )


def tokenize(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  vocab_size: int | None = None,
) -> Example:
  """Returns a conversation as tokens, at its full length.

  A trained turn is learned up to and with the token that ends it. The template
  alone decides about a beginning-of-sequence token, so there is never a second
  one. Plain text gets what the tokenizer adds to text, and an end.

  Args:
    conversation: What to tokenize.
    tokenizer: A fast tokenizer of transformers, with its chat template.
    vocab_size: Rows of the embedding; None does not check the ids.

  Returns:
    The example.

  Raises:
    DataError: There is no chat template, it refuses the conversation or
      rewrites earlier turns, nothing ends a turn, or an id has no row.
  """
  if conversation.is_text:
    tokens = _encode(conversation.reference, tokenizer, special=True)
    tokens = _with_end(tokens, tokenizer)
    mask = np.ones(len(tokens), bool)
  else:
    tokens, mask = _tokenize_turns(conversation.messages, tokenizer)
  mask[:1] = False
  if vocab_size is not None and tokens.max(initial=0) >= vocab_size:
    raise DataError(
      f'token id {tokens.max()} has no row in the embedding of {vocab_size}'
      ' rows; use the tokenizer that belongs to the base'
    )
  return Example(tokens, mask)


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
  text = _render(conversation.prompt, tokenizer, header=True)
  return _encode(text, tokenizer)


def _tokenize_turns(
  messages: tuple[Message, ...], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  check_template(tokenizer)
  whole = _render(messages, tokenizer)
  tokens = _encode(whole, tokenizer)
  mask = np.zeros(len(tokens), bool)
  ends = _ends(tokenizer)
  for k, message in enumerate(messages):
    if not message.trained:
      continue
    given = _render(messages[:k], tokenizer, header=True)
    said = _render(messages[: k + 1], tokenizer)
    if not (said.startswith(given) and whole.startswith(said)):
      raise DataError(
        f'the chat template rewrites what comes before turn {k + 1} of'
        f' {len(messages)} once more follows, so what was said there cannot be'
        ' told apart; give conversations with one answer, or another template'
      )
    start = _common(_encode(given, tokenizer), tokens)
    stop = _common(_encode(said, tokenizer), tokens)
    mask[start : _turn_end(tokens, start, stop, ends)] = True
  if messages[-1].trained and not (mask.any() and _last(tokens, mask) in ends):
    tokens, mask = _close(tokens, mask, tokenizer)
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


def _ends(tokenizer: Tokenizer) -> frozenset[int]:
  """Returns the special tokens, one of which ends a turn."""
  added = tokenizer.added_tokens_decoder
  special = {id_ for id_, token in added.items() if token.special}
  return frozenset(special | set(tokenizer.all_special_ids))


def _common(a: np.ndarray, b: np.ndarray) -> int:
  """Returns the length of the longest common prefix."""
  n = min(len(a), len(b))
  different = np.flatnonzero(a[:n] != b[:n])
  return int(different[0]) if len(different) else n


def _render(
  messages: tuple[Message, ...], tokenizer: Tokenizer, *, header: bool = False
) -> str:
  """Returns the text of turns; `header` opens an answer after them."""
  check_template(tokenizer)
  turns = [{'role': m.role, 'content': m.content} for m in messages]
  try:
    return tokenizer.apply_chat_template(
      turns, tokenize=False, add_generation_prompt=header
    )
  except jinja2.TemplateError as error:
    roles = ', '.join(message.role for message in messages)
    raise DataError(
      f'the chat template refuses a conversation of {roles}: {error}; change'
      ' the roles, or use another base'
    ) from error


def _encode(
  text: str, tokenizer: Tokenizer, *, special: bool = False
) -> np.ndarray:
  ids = tokenizer(text, add_special_tokens=special)['input_ids']
  return np.asarray(ids, np.int32)
