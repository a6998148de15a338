"""What is said: turns, and the conversations that they make."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn.

  Attributes:
    role: 'system', 'user', 'assistant' or 'tool'; 'text' in plain text.
    content: What is said; may be empty where a tool is called.
    trained: Whether the model learns to say it.
    more: What else a chat template may read of it: `tool_calls`,
      `reasoning_content`, `name` and the like.
    muted: Whether its `weight` is 0.
  """

  role: str
  content: str
  trained: bool = False
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  muted: bool = False

  def fields(self) -> dict[str, Any]:
    """Returns the turn as a chat template reads it."""
    return {'role': self.role, 'content': self.content, **self.more}


@dataclasses.dataclass(frozen=True)
class Conversation:
  """An example before it is tokenized.

  Attributes:
    messages: The turns; the last is what the model should say.
    tools: Descriptions of tools that the model may call, as JSON schemas.
    template: What else the chat template gets, such as `enable_thinking`.
    where: What names its row in a message; '' where it has none.
    task: The task whose verifier scores an answer; None where there is none.
    entry: What that verifier needs; nobody else reads it.
  """

  messages: tuple[Message, ...]
  tools: tuple[Mapping[str, Any], ...] = dataclasses.field(
    default=(), hash=False
  )
  template: Mapping[str, Any] = dataclasses.field(
    default_factory=dict, hash=False
  )
  where: str = dataclasses.field(default='', compare=False)
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

  def prompt_key(self) -> str:
    """Returns what two conversations share that ask the same.

    Spaces around what is said do not count.
    """
    turns = [
      {**message.fields(), 'content': message.content.strip()}
      for message in self.prompt
    ]
    return json.dumps([turns, self.tools], default=str, sort_keys=True)


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
