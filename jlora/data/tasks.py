"""Tasks of reasoning_gym: endless questions, each with its own verifier."""

import dataclasses
import difflib
import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jlora.data.conversations import Conversation, make_exchange
from jlora.errors import DataError

# The system turn of every question, for the base and the tuned model alike.
ANSWER_FORMAT = 'Reply with the answer only.'

# Entry i of a task is drawn from the generator seeded with seed + i, so that
# neighboring seeds share almost all entries. Streams therefore start this far
# apart: evaluation at 0, training with seed s at (1 + s) times this.
STREAM = 1 << 20
_BLOCK = 256


@functools.cache
def task_names() -> tuple[str, ...]:
  """Returns the names of all tasks, sorted, without importing any.

  They are read from the text of the installed package, which takes some tens
  of milliseconds; importing it takes the better part of a second.

  Raises:
    DataError: reasoning_gym is not installed.
  """
  spec = importlib.util.find_spec('reasoning_gym')
  if spec is None or spec.origin is None:
    raise DataError(
      "'reasoning_gym:' needs the package; pip install reasoning-gym"
    )
  name = re.compile(
    r'(?:^DATASET_NAME\s*=|register_dataset\()\s*["\'](\w+)', re.MULTILINE
  )
  files = pathlib.Path(spec.origin).parent.rglob('*.py')
  texts = (file.read_text(encoding='utf-8') for file in files)
  return tuple(sorted({found for t in texts for found in name.findall(t)}))


def check_task(task: str) -> None:
  """Requires that a task exists.

  Args:
    task: Its name, such as 'family_relationships'.

  Raises:
    DataError: There is none of this name; the message holds a close one.
  """
  names = task_names()
  if task not in names:
    close = difflib.get_close_matches(task, names, n=1, cutoff=0.0)[0]
    raise DataError(
      f'reasoning_gym has no task {task!r}; did you mean {close!r}? It has'
      f' {len(names)}, listed at its documentation'
    )


def draw_task(task: str, *, split: str, seed: int) -> Iterator[Conversation]:
  """Draws questions without end; the two splits never share an entry.

  Args:
    task: The name of a task.
    split: 'train', or 'eval', which does not depend on the seed.
    seed: Which stream of training questions, 0 to 4093.

  Yields:
    A question under the system turn `ANSWER_FORMAT`, with its answer.

  Raises:
    DataError: There is no such task or seed, it cannot be drawn as it is, or
      it has no reference answers to learn.
  """
  check_task(task)
  if not 0 <= seed < (1 << 32) // STREAM - 2:
    raise DataError(f'seed {seed} is not within 0 and 4093; choose another')
  start = 0 if split == 'eval' else (1 + seed) * STREAM
  for entry in _entries(task, start):
    question, answer = entry['question'].strip(), entry['answer']
    if not isinstance(answer, str) or not answer.strip():
      raise DataError(
        f'task {task!r} gives {answer!r} as an answer, so there is nothing to'
        ' learn; choose a task with reference answers'
      )
    exchange = make_exchange(question, answer.strip(), system=ANSWER_FORMAT)
    yield dataclasses.replace(exchange, task=task, entry=entry)


def _entries(task: str, start: int) -> Iterator[dict[str, Any]]:
  """Draws block after block, since some tasks prepare a block at once."""
  import reasoning_gym

  for seed in range(start, start + STREAM, _BLOCK):
    try:
      block = reasoning_gym.create_dataset(task, seed=seed, size=_BLOCK)
    except (AssertionError, TypeError, ValueError) as error:
      raise DataError(
        f'task {task!r} cannot be drawn by its name alone: {error}; choose'
        ' another'
      ) from error
    for index in range(_BLOCK):
      yield block[index]


def score_answer(completion: str, conversation: Conversation) -> float:
  """Returns what the task's own verifier says of an answer.

  Args:
    completion: What the model wrote; space around it does not count.
    conversation: The question, drawn by `draw_task`.

  Returns:
    1.0 for a right answer, as a rule 0.0 to less than 1 for others.

  Raises:
    DataError: The conversation has no verifier.
  """
  if conversation.task is None:
    raise DataError(
      f'{conversation.reference!r} comes from no task, so that nothing'
      ' verifies an answer; score reasoning_gym tasks only'
    )
  return float(
    _verifier(conversation.task)(completion.strip(), conversation.entry)
  )


@functools.cache
def _verifier(task: str) -> Callable[[str, Any], float]:
  import reasoning_gym

  return reasoning_gym.get_score_answer_fn(task)


@dataclasses.dataclass(frozen=True)
class AnswerShape:
  """What the answers of a task look like, right or wrong.

  Attributes:
    numeric: Whether all of them are plain numbers.
    lines: The most lines that one has.
    words: The most words that one has.
    marks: Every character but letters, digits and space that occurs.
  """

  numeric: bool
  lines: int
  words: int
  marks: frozenset[str]

  def fits(self, completion: str) -> bool:
    """Returns whether a completion could be an answer, by its form alone."""
    text = completion.strip()
    return (
      bool(text)
      and (_is_number(text) or not self.numeric)
      and len(text.splitlines()) <= self.lines
      and len(text.split()) <= self.words
      and _marks(text) <= self.marks
    )


def shape_of(answers: Iterable[str]) -> AnswerShape:
  """Returns the shape that covers all reference answers of a task."""
  answers = [answer.strip() for answer in answers]
  return AnswerShape(
    numeric=all(map(_is_number, answers)),
    lines=max(len(answer.splitlines()) for answer in answers),
    words=max(len(answer.split()) for answer in answers),
    marks=frozenset().union(*map(_marks, answers)),
  )


def _is_number(text: str) -> bool:
  return re.fullmatch(r'[-+]?\d+(\.\d+)?', text) is not None


def _marks(text: str) -> frozenset[str]:
  return frozenset(c for c in text if not c.isalnum() and not c.isspace())
