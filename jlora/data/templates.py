"""Conversations as text, through the chat template of a base's tokenizer."""

import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from jlora.core.targets import as_pairs
from jlora.data.conversations import Conversation, Message
from jlora.data.lines import first_line
from jlora.data.template_names import (
  fields_of,
  thinking_field,
  variables_of,
)
from jlora.errors import ConfigError, DataError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast as Tokenizer
else:
  Tokenizer = Any

# What a template gets from jlora.
_OWN = (
  'add_generation_prompt',
  'chat_template',
  'conversation',
  'messages',
  'tokenize',
  'tools',
)

# What a template raises that does not fit its turns.
_FAULTS = (
  jinja2.TemplateError,
  ArithmeticError,
  AttributeError,
  LookupError,
  RecursionError,
  TypeError,
  ValueError,
)


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


def check_written(conversation: Conversation, tokenizer: Tokenizer) -> None:
  """Requires that the template writes all that a conversation holds.

  Args:
    conversation: Its turns may call tools or think.
    tokenizer: With its chat template.

  Raises:
    DataError: There is no template, or it never names what is there.
  """
  check_template(tokenizer)
  template = _template(tokenizer)
  fields = {name for m in conversation.messages for name in m.more}
  for name in conversation.template:
    if name not in variables_of(template):
      raise DataError(
        f'the chat template does not read {name!r}, which data.template sets;'
        ' leave it out'
      )
  no_tools = conversation.tools and 'tools' not in variables_of(template)
  no_calls = 'tool_calls' in fields - fields_of(template)
  if no_tools or no_calls:
    raise DataError(
      f'{_at(conversation)}the chat template has no place for'
      f' {"tools" if no_tools else "tool_calls"!r}; use a base whose template'
      ' calls tools, or leave such rows out'
    )
  if 'reasoning_content' in fields and thinking_field(template) is None:
    raise DataError(
      f'{_at(conversation)}the chat template has no place for'
      " 'reasoning_content'; set data.thinking='drop', or write it into the"
      ' content, such as <think>...</think>'
    )


def _template(tokenizer: Tokenizer) -> str:
  """Returns the chat template; several, of which tools pick one, as one."""
  template = tokenizer.chat_template
  several = isinstance(template, dict)
  return '\n'.join(template.values()) if several else str(template)


def make_fields(value: Any) -> tuple[tuple[str, Any], ...]:
  """Returns what a config gives a template as pairs.

  Args:
    value: A mapping or pairs.

  Raises:
    ConfigError: It is something else, or names what jlora itself gives.
  """
  try:
    pairs = as_pairs(value, 'data.template')
  except ConfigError as error:
    raise ConfigError(
      f'data.template is {value!r}; it takes a dict of fields that the chat'
      " template reads, such as {'enable_thinking': False}"
    ) from error
  for name, _ in pairs:
    if not name.isidentifier() or name in _OWN:
      raise ConfigError(
        f'data.template sets {name!r}; it takes fields that the chat template'
        " reads, such as {'enable_thinking': False}"
      )
  return pairs


def notes_on(tokenizer: Tokenizer, fields: Collection[str]) -> list[str]:
  """Returns what is worth knowing of a chat template, a sentence each.

  Args:
    tokenizer: With or without one.
    fields: What it gets from the config.
  """
  template = str(getattr(tokenizer, 'chat_template', None))
  if 'strftime_now' not in template or 'date_string' in fields:
    return []
  fix = "; data.template={'date_string': '26 Jul 2024'} fixes it"
  return [
    "the chat template writes today's date, so that the run cannot be"
    f' continued tomorrow{fix if "date_string" in template else ""}'
  ]


def _at(conversation: Conversation) -> str:
  return f'{conversation.where}: ' if conversation.where else ''


def render(
  conversation: Conversation,
  messages: Sequence[Message],
  tokenizer: Tokenizer,
  *,
  header: bool = False,
) -> str:
  """Returns the text of the first turns of a conversation.

  Args:
    conversation: Whose tools and fields the template gets.
    messages: Its first turns.
    tokenizer: With its chat template.
    header: Whether an answer is opened after them.

  Raises:
    DataError: There is no template, or it refuses the turns.
  """
  check_template(tokenizer)
  thinking = thinking_field(_template(tokenizer))
  try:
    return tokenizer.apply_chat_template(
      [_fields(message, thinking) for message in messages],
      tools=list(conversation.tools) or None,
      tokenize=False,
      add_generation_prompt=header,
      **conversation.template,
    )
  except _FAULTS as error:
    roles = ', '.join(message.role for message in messages)
    raise DataError(
      f'{_at(conversation)}the chat template refuses a conversation of {roles}:'
      f' {first_line(error)}; change the roles, or use another base'
    ) from error


def _fields(message: Message, thinking: str | None) -> dict[str, Any]:
  """Returns a turn whose thoughts have the name that the template reads."""
  fields = message.fields()
  if thinking and 'reasoning_content' in fields:
    fields[thinking] = fields.pop('reasoning_content')
  return fields


def said_in(text: str, tokenizer: Tokenizer) -> str:
  """Returns rendered turns without what closes the text and not the turn.

  Phi-3's template writes `<|end|>` after each turn, and after the last one
  also the end of the text, which a model does not get to say.

  Args:
    text: As `render` returns it, without a header.
    tokenizer: What rendered it.
  """
  end = tokenizer.eos_token
  turns = text.removesuffix(end) if end else text
  if turns != text and is_closed(turns, tokenizer):
    return turns
  return text


def is_closed(text: str, tokenizer: Tokenizer) -> bool:
  """Returns whether a text ends with a special token, but for spaces."""
  return text.rstrip().endswith(special_tokens(tokenizer)[1])


@functools.lru_cache(maxsize=8)
def special_tokens(
  tokenizer: Tokenizer,
) -> tuple[frozenset[int], tuple[str, ...]]:
  """Returns the ids and the texts of special tokens, one of which ends a turn.

  A tokenizer lists thousands of added tokens anew whenever it is asked.

  Args:
    tokenizer: With all of its tokens.
  """
  added = tokenizer.added_tokens_decoder.items()
  special = {id_: token.content for id_, token in added if token.special}
  ids = frozenset((*special, *tokenizer.all_special_ids))
  return ids, (*special.values(), *tokenizer.all_special_tokens)
