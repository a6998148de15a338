"""Turns of a conversation, read and put in order."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.data.conversations import Message

# What may follow a turn; an assistant that calls tools waits for them.
_NEXT = {
  'start': ('system', 'user'),
  'system': ('user',),
  'user': ('assistant',),
  'assistant': ('user',),
  'call': ('tool',),
  'tool': ('tool', 'assistant'),
}
# Under these names turns hold what was thought before the answer, the first of
# which it has here.
THINKING = ('reasoning_content', 'reasoning', 'thinking')


def read_turns(turns: Any, field: str) -> tuple[Message, ...]:
  """Returns turns with `role` and `content`, in an order that makes sense.

  A turn of the assistant is trained unless its `weight` is 0.

  Args:
    turns: A list of mappings.
    field: Which field of the row it is, for messages.

  Raises:
    ValueError: A turn is malformed, or stands where it cannot.
  """
  if not isinstance(turns, list) or not turns:
    raise ValueError(f'{field!r} is {short(turns)}; give a list of turns')
  messages = tuple(read_turn(turn) for turn in turns)
  check_order(messages)
  return messages


def read_turn(turn: Any) -> Message:
  """Returns one turn.

  Args:
    turn: A mapping with `role`, `content` and what else a template reads.

  Raises:
    ValueError: A field is missing or malformed.
  """
  if not isinstance(turn, Mapping):
    raise ValueError(f'turn {short(turn)} has no role and content')
  fields = {name: value for name, value in turn.items() if value is not None}
  role, weight = fields.pop('role', None), fields.pop('weight', None)
  if weight not in (None, 0, 1):
    raise ValueError(f'weight {short(weight)} of a turn is neither 0 nor 1')
  if 'tool_calls' in fields:
    fields['tool_calls'] = _read_calls(fields['tool_calls'])
    if not fields['tool_calls']:
      del fields['tool_calls']
  thoughts = [fields.pop(name) for name in THINKING if name in fields]
  if thoughts:
    fields['reasoning_content'] = thoughts[0]
  apart = {'tool_calls', 'reasoning_content'}
  speaks = not (role == 'tool' or apart & fields.keys())
  content = text_in(fields, 'content') if speaks else _maybe_text(fields)
  fields.pop('content', None)
  trained = role == 'assistant' and weight != 0
  return Message(role, content, trained, fields, muted=weight == 0)


def _maybe_text(fields: Mapping[str, Any]) -> str:
  """Returns the content of a turn that may say nothing."""
  return text_in(fields, 'content') if fields.get('content') else ''


def _read_calls(calls: Any) -> list[dict[str, Any]]:
  """Returns calls of tools with their arguments as objects.

  Files have them as text, as the API of OpenAI does; templates write them.
  """
  if not isinstance(calls, list):
    raise ValueError(f"'tool_calls' is {short(calls)}; give a list")
  return [_read_call(call) for call in calls]


def _read_call(call: Any) -> dict[str, Any]:
  function = call.get('function', call) if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping) or not function.get('name'):
    raise ValueError(
      f'tool call {short(call)} has no function with a name and arguments'
    )
  arguments = function.get('arguments') or {}
  if isinstance(arguments, str):
    arguments = _object(arguments, 'the arguments of a tool call')
  if not isinstance(arguments, Mapping):
    raise ValueError(
      f'the arguments of a tool call are {short(arguments)}; give an object'
    )
  outer = {} if function is call else call
  outer = {name: value for name, value in outer.items() if value is not None}
  inner = {'name': function['name'], 'arguments': dict(arguments)}
  return {'type': 'function', **outer, 'function': inner}


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
  """Returns the tools that a row describes.

  Args:
    tools: A list of JSON schemas, or such a list as text; None is none.

  Raises:
    ValueError: They are something else.
  """
  if isinstance(tools, str):
    try:
      tools = json.loads(tools) if tools.strip() else None
    except (ValueError, RecursionError) as error:
      raise ValueError(f"'tools' is {short(tools)}, not JSON") from error
  are_schemas = isinstance(tools, list) and all(
    isinstance(tool, Mapping) for tool in tools
  )
  if tools is not None and not are_schemas:
    raise ValueError(f"'tools' is {short(tools)}; give a list of JSON schemas")
  return tuple(tools or ())


def _object(text: str, what: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{what} are {short(text)}, not JSON') from error


def check_order(messages: Sequence[Message]) -> None:
  """Requires that turns follow each other as in a conversation.

  That is [system], then user and assistant in turns; between them, tools
  answer an assistant that calls them.

  Args:
    messages: The turns.

  Raises:
    ValueError: They do not, or the last is not the assistant's.
  """
  last, roles = 'start', [message.role for message in messages]
  for message in messages:
    if message.role not in _NEXT[last]:
      break
    calls = message.role == 'assistant' and 'tool_calls' in message.more
    last = 'call' if calls else message.role
  else:
    if last in ('assistant', 'call'):
      return
  raise ValueError(
    f'roles {short(roles)} are out of order; after an optional system turn,'
    ' user and assistant take turns (tools answer an assistant with'
    ' tool_calls), and assistant is last'
  )


def text_in(row: Mapping[str, Any], field: str) -> str:
  """Returns a field that must hold text.

  Args:
    row: A row or a turn.
    field: Its name.

  Raises:
    ValueError: It is missing, blank, or no text.
  """
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'{field!r} is {short(value)}; give text')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{field!r} holds half a surrogate pair') from error
  return value


def short(value: Any) -> str:
  """Returns a value for a message, cut where it is long."""
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
