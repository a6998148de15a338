"""What is thought before an answer, kept or dropped."""

import dataclasses
import re

from jlora.data.conversations import Conversation, Message
from jlora.data.turns import THINKING
from jlora.errors import DataError

KEEP = ('keep', 'drop')

_BLOCK = re.compile(r'\s*<think>.*?</think>\s*', re.DOTALL)


def without_thinking(conversation: Conversation) -> tuple[Conversation, int]:
  """Returns a conversation without what is thought, and from how many turns.

  That is a `<think>` block with which an answer begins, and the fields that
  hold the same apart from the content.

  Args:
    conversation: What is trained on or held out.

  Raises:
    DataError: A turn holds nothing else; with its row.
  """
  messages = tuple(
    _without(message, conversation.where) for message in conversation.messages
  )
  pairs = zip(messages, conversation.messages, strict=True)
  dropped = sum(new != old for new, old in pairs)
  return dataclasses.replace(conversation, messages=messages), dropped


def _without(message: Message, where: str) -> Message:
  if message.role != 'assistant':
    return message
  found = _BLOCK.match(message.content)
  content = message.content[found.end() :] if found else message.content
  more = {k: v for k, v in message.more.items() if k not in THINKING}
  if not content.strip() and 'tool_calls' not in more:
    raise DataError(
      f'{where}: an answer holds nothing but what is thought; leave the row'
      " out, or set data.thinking='keep'"
    )
  return dataclasses.replace(message, content=content, more=more)
