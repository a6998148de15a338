"""Where data comes from: a task, a local file or folder, or the hub."""

import itertools
import os
import re

from jlora.data import files, tasks
from jlora.data.conversations import Conversation
from jlora.errors import DataError

_TASK = 'reasoning_gym:'
_HUB = re.compile(r'[\w.-]+/[\w.-]+(:\w+)?')
_OTHER_FILE = re.compile(
  r'.*\.(json|csv|tsv|txt|parquet|arrow|yaml|gz|zip|zst)', re.IGNORECASE
)


def check_source(source: str) -> None:
  """Finds what is wrong with a source's name before anything is loaded.

  Args:
    source: `reasoning_gym:TASK`, a .jsonl file, a folder that `datasets`
      reads, or the `owner/name` of a dataset on the hub; the last two with
      `:SPLIT` where it is not 'train'.

  Raises:
    DataError: The task or file does not exist, the file is damaged, or it is
      none of these.
  """
  kind = _kind(source)
  if kind == 'task':
    tasks.check_task(source.removeprefix(_TASK))
  if kind == 'file':
    files.check_file(source)


def is_task(source: str) -> bool:
  """Returns whether a source draws questions of a task, without end."""
  return source.startswith(_TASK)


def _kind(source: str) -> str:
  """Returns 'task', 'file' or 'hub'; a folder counts as the last."""
  if is_task(source):
    return 'task'
  if source.endswith('.jsonl'):
    return 'file'
  if _OTHER_FILE.fullmatch(source) or os.path.isfile(source):
    raise DataError(
      f'data file {source!r} is no .jsonl file; write one JSON object a line'
      ' into one'
    )
  if os.path.isdir(source.partition(':')[0]) or _HUB.fullmatch(source):
    return 'hub'
  raise DataError(
    f'data source {source!r} is none of reasoning_gym:TASK, FILE.jsonl, an'
    ' existing folder and the owner/name of a dataset on the hub'
  )


def load_conversations(
  source: str, *, split: str, examples: int | None, seed: int = 0
) -> tuple[list[Conversation], str]:
  """Reads a source.

  Args:
    source: As in `check_source`.
    split: 'train' or 'eval'; it tells the two streams of a task apart.
    examples: How many to read, from the start; None reads all of them, which
      a task does not have.
    seed: Which stream of a task's training questions.

  Returns:
    The conversations, and a line that says what was read.

  Raises:
    DataError: The source is wrong, empty, or a row of it is malformed.
  """
  if _kind(source) == 'task':
    if examples is None:
      raise DataError(
        f'{source!r} has no end; set data.{split}_examples to a number'
      )
    drawn = tasks.draw_task(source.removeprefix(_TASK), split=split, seed=seed)
    rows = list(itertools.islice(drawn, examples))
    return rows, f'{source}: {len(rows)} {split} questions drawn'
  load = files.load_file if _kind(source) == 'file' else files.load_hub
  rows, row_format = load(source, examples=examples)
  if not rows:
    raise DataError(f'{source!r} holds no row; give at least one')
  return rows, f'{source}: {len(rows)} rows read as {row_format!r}'
