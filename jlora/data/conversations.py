"""Rows of data as conversations, whatever format they were written in."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn.

  Attributes:
    role: 'system', 'user' or 'assistant'; 'text' in plain text.
    content: What is said.
    trained: Whether the model learns to say it.
  """

  role: str
  content: str
  trained: bool = False


@dataclasses.dataclass(frozen=True)
class Conversation:
  """An example before it is tokenized.

  Attributes:
    messages: The turns; the last is what the model should say.
    task: The task whose verifier scores an answer; None where there is none.
    entry: What that verifier needs; nobody else reads it.
  """

  messages: tuple[Message, ...]
  task: str | None = None
  entry: Any = dataclasses.field(default=None, compare=False, repr=False)

  @property
  def is_text(self) -> bool:
    """Whether this is plain text, which has no turns and no prompt."""
    return self.messages[0].role == 'text'

  @property
  def prompt(self) -> tuple[Message, ...]:
    """The turns before the last; of plain text the whole of it."""
    return self.messages if self.is_text else self.messages[:-1]

  @property
  def reference(self) -> str:
    """What the model should say last."""
    return self.messages[-1].content


def make_text(content: str) -> Conversation:
  """Returns plain text, all of which is learned."""
  return Conversation((Message('text', content, trained=True),))


def make_exchange(
  question: str, answer: str, *, system: str | None = None
) -> Conversation:
  """Returns one question and its answer, under an optional system turn."""
  turns = (
    Message('user', question),
    Message('assistant', answer, trained=True),
  )
  return Conversation(((Message('system', system),) if system else ()) + turns)


def detect_format(row: Mapping[str, Any]) -> str:
  """Returns the name of the format that a row is written in.

  Args:
    row: A row, as a rule the first of its source.

  Returns:
    'messages', 'prompt/completion', 'alpaca' or 'text', in this order of
    preference where a row fits several.

  Raises:
    ValueError: It is written in none of them.
  """
  for name, (fields, _) in _FORMATS.items():
    if all(row.get(field) is not None for field in fields):
      return name
  known = '; '.join(', '.join(fields) for fields, _ in _FORMATS.values())
  raise ValueError(
    f'fields {sorted(row)} fit no known format; give one of: {known}'
  )


def read_row(row: Mapping[str, Any], row_format: str) -> Conversation:
  """Returns a row as a conversation.

  Args:
    row: A row of the source.
    row_format: As `detect_format` names it.

  Raises:
    ValueError: A field is missing or malformed, or turns are out of order.
  """
  fields, read = _FORMATS[row_format]
  for field in fields:
    if row.get(field) is None:
      raise ValueError(
        f'has no {field!r}, which every row of the format {row_format!r}'
        f' needs; it has {sorted(row)}'
      )
  return read(row)


def _read_messages(row: Mapping[str, Any]) -> Conversation:
  turns = row['messages']
  if not isinstance(turns, list) or not turns:
    raise ValueError(f"'messages' is {_short(turns)}; give a list of turns")
  messages = tuple(_read_message(turn) for turn in turns)
  _check_order([message.role for message in messages])
  if not any(message.trained for message in messages):
    raise ValueError('no turn is trained; every weight is 0')
  return Conversation(messages)


def _read_message(turn: Any) -> Message:
  if not isinstance(turn, Mapping):
    raise ValueError(f'turn {_short(turn)} has no role and content')
  role, content = turn.get('role'), _text(turn, 'content')
  weight = turn.get('weight')
  if weight not in (None, 0, 1):
    raise ValueError(f'weight {_short(weight)} of a turn is neither 0 nor 1')
  return Message(role, content, role == 'assistant' and weight != 0)


def _check_order(roles: list[Any]) -> None:
  """Requires [system], user, assistant, user, assistant, ..."""
  turns = roles[1:] if roles[0] == 'system' else roles
  wanted = ['user', 'assistant'] * ((len(turns) + 1) // 2)
  if turns != wanted or not turns:
    raise ValueError(
      f'roles {_short(roles)} are out of order; after an optional system turn,'
      ' user and assistant take turns, and assistant is last'
    )


def _read_completion(row: Mapping[str, Any]) -> Conversation:
  return make_exchange(_text(row, 'prompt'), _text(row, 'completion'))


def _read_alpaca(row: Mapping[str, Any]) -> Conversation:
  question = _text(row, 'instruction')
  if row.get('input'):
    question += '\n\n' + _text(row, 'input')
  return make_exchange(question, _text(row, 'output'))


def _text(row: Mapping[str, Any], field: str) -> str:
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'{field!r} is {_short(value)}; give text')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{field!r} holds half a surrogate pair') from error
  return value


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


_FORMATS: dict[
  str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Conversation]]
] = {
  'messages': (('messages',), _read_messages),
  'prompt/completion': (('prompt', 'completion'), _read_completion),
  'alpaca': (('instruction', 'output'), _read_alpaca),
  'text': (('text',), lambda row: make_text(_text(row, 'text'))),
}
