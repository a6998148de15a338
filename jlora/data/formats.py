"""The formats that a row may be written in."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jlora.data.conversations import (
  Conversation,
  Message,
  make_exchange,
  make_text,
)
from jlora.data.turns import (
  check_order,
  read_tools,
  read_turn,
  read_turns,
  short,
  text_in,
)

# Who speaks in rows of ShareGPT and of those who followed it.
_SPEAKERS = {
  'system': 'system',
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'bing': 'assistant',
  'bard': 'assistant',
  'model': 'assistant',
  'assistant': 'assistant',
  'function_call': 'assistant',
  'tool': 'tool',
  'observation': 'tool',
  'function_response': 'tool',
}


def detect_format(row: Mapping[str, Any]) -> str:
  """Returns the name of the format that a row is written in.

  Args:
    row: A row, as a rule the first of its source.

  Returns:
    'messages', 'sharegpt', 'prompt/completion', 'alpaca' or 'text', in this
    order of preference where a row fits several.

  Raises:
    ValueError: It is written in none of them.
  """
  for name, (fields, _, _) in _FORMATS.items():
    if all(row.get(field) is not None for field in fields):
      return name
  known = '; '.join(', '.join(fields) for fields, _, _ in _FORMATS.values())
  raise ValueError(
    f'fields {sorted(map(str, row))} fit no known format; give one of: {known},'
    " or say in data.columns which columns hold them, such as {'prompt':"
    " 'question', 'completion': 'answer'}"
  )


def read_row(
  row: Mapping[str, Any], row_format: str, where: str = ''
) -> Conversation:
  """Returns a row as a conversation.

  Args:
    row: A row of the source.
    row_format: As `detect_format` names it.
    where: What names the row in later messages.

  Raises:
    ValueError: A field is missing or malformed, or turns are out of order.
  """
  fields, optional, read = _FORMATS[row_format]
  for field in fields:
    if row.get(field) is None:
      raise ValueError(
        f'has no {field!r}, which every row of the format {row_format!r}'
        f' needs; it has {sorted(map(str, row))}'
      )
  _refuse_unread(row, row_format)
  conversation = read(row)
  if 'system' in optional and row.get('system'):
    conversation = _under(text_in(row, 'system'), conversation)
  if not any(message.trained for message in conversation.messages):
    raise ValueError('no turn is trained; every weight is 0')
  tools = read_tools(row.get('tools')) if 'tools' in optional else ()
  return dataclasses.replace(conversation, tools=tools, where=where)


def columns_read(row_format: str) -> frozenset[str]:
  """Returns the columns that rows of a format are read from.

  Args:
    row_format: As `detect_format` names it.
  """
  fields, optional, _ = _FORMATS[row_format]
  return frozenset((*fields, *optional))


def _refuse_unread(row: Mapping[str, Any], row_format: str) -> None:
  """Refuses what would turn the meaning of a row around if it is left out."""
  avoid = str(row.get('label')).lower() == 'false'
  if row_format == 'prompt/completion' and avoid:
    raise ValueError(
      "'label' is False, so the completion is one to avoid, and jlora learns"
      ' every completion; leave such rows out'
    )
  if row_format == 'alpaca' and row.get('history'):
    raise ValueError(
      f"'history' is {short(row['history'])}, earlier turns, which rows of"
      " instruction and output do not have here; write the row as 'messages'"
    )


def _under(system: str, conversation: Conversation) -> Conversation:
  """Returns a conversation with a system turn before it."""
  messages = (Message('system', system), *conversation.messages)
  check_order(messages)
  return dataclasses.replace(conversation, messages=messages)


def _read_chat(row: Mapping[str, Any], field: str) -> Conversation:
  turns = row[field]
  if isinstance(turns, list):
    turns = [_as_turn(turn) for turn in turns]
  return Conversation(read_turns(turns, field))


def _as_turn(turn: Any) -> Any:
  """Returns a turn of `from` and `value` as one of `role` and `content`."""
  if not isinstance(turn, Mapping) or 'from' not in turn:
    return turn
  turn = dict(turn)
  speaker, said = turn.pop('from'), turn.pop('value', None)
  if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
    raise ValueError(
      f"a turn is 'from' {short(speaker)}; known are {', '.join(_SPEAKERS)}"
    )
  turn['role'] = _SPEAKERS[speaker.lower()]
  if speaker.lower() == 'function_call':
    return {**turn, 'tool_calls': _as_calls(said)}
  return {**turn, 'content': said}


def _as_calls(said: Any) -> list[Any]:
  try:
    calls = json.loads(said)
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f"'function_call' is {short(said)}, not JSON") from error
  return calls if isinstance(calls, list) else [calls]


def _read_completion(row: Mapping[str, Any]) -> Conversation:
  prompt, completion = row['prompt'], row['completion']
  if not (isinstance(prompt, list) and isinstance(completion, list)):
    return make_exchange(text_in(row, 'prompt'), text_in(row, 'completion'))
  given = [
    dataclasses.replace(read_turn(turn), trained=False) for turn in prompt
  ]
  messages = (*given, *map(read_turn, completion))
  check_order(messages)
  return Conversation(messages)


def _read_alpaca(row: Mapping[str, Any]) -> Conversation:
  question = text_in(row, 'instruction')
  if row.get('input'):
    question += '\n\n' + text_in(row, 'input')
  return make_exchange(question, text_in(row, 'output'))


# Of each format: fields that every row has, fields that it may have, reader.
_FORMATS: dict[
  str,
  tuple[
    tuple[str, ...],
    tuple[str, ...],
    Callable[[Mapping[str, Any]], Conversation],
  ],
] = {
  'messages': (
    ('messages',),
    ('system', 'tools'),
    lambda row: _read_chat(row, 'messages'),
  ),
  'sharegpt': (
    ('conversations',),
    ('system', 'tools'),
    lambda row: _read_chat(row, 'conversations'),
  ),
  'prompt/completion': (
    ('prompt', 'completion'),
    ('system', 'tools'),
    _read_completion,
  ),
  'alpaca': (('instruction', 'output'), ('input', 'system'), _read_alpaca),
  'text': (('text',), (), lambda row: make_text(text_in(row, 'text'))),
}
REQUIRED = frozenset(f for fields, _, _ in _FORMATS.values() for f in fields)
# Every field that is read, those that rows need before those they may have.
FIELDS = tuple(
  dict.fromkeys(
    [f for fields, _, _ in _FORMATS.values() for f in fields]
    + [f for _, fields, _ in _FORMATS.values() for f in fields]
  )
)
