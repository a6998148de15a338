"""Where data comes from: a task, a local file or folder, or the hub."""

import itertools
import os
from collections.abc import Iterator

from jlora.data import files, folders, hub, tasks
from jlora.data.conversations import Conversation
from jlora.data.rows import Columns, RowReader
from jlora.errors import DataError

_TASK = 'reasoning_gym:'
# Endings of files that are not read, and of no dataset on the hub.
_PACKED = (
  '.arrow',
  '.bz2',
  '.gz',
  '.tar',
  '.tgz',
  '.xlsx',
  '.xz',
  '.zip',
  '.zst',
)


def check_source(
  source: str,
  *,
  split: str = 'train',
  whole: bool = True,
  columns: Columns = (),
) -> None:
  """Finds what is wrong with a source before anything is loaded.

  Args:
    source: `reasoning_gym:TASK`, a data file (see `files.read_file`), a folder
      of such files, or the `owner/name` of a dataset on the hub; the last two
      with `:SPLIT` where it is not 'train'.
    split: 'train' or 'eval': which of a folder's files are meant where the
      source does not say.
    whole: Whether files are looked at to their end; else their beginning.
    columns: Pairs of a field and the column that holds it.

  Raises:
    DataError: The task or file does not exist, a file is damaged, its first
      row is malformed, or it is none of these.
  """
  kind = _kind(source)
  if kind == 'task':
    tasks.check_task(source.removeprefix(_TASK))
  for path in files_of(source, split):
    files.check_file(path, whole=whole)
    reader = RowReader(source, columns)
    for row in itertools.islice(reader.filled(files.read_file(path)), 1):
      reader.read(*row)


def is_task(source: str) -> bool:
  """Returns whether a source draws questions of a task, without end."""
  return source.startswith(_TASK)


def _kind(source: str) -> str:
  """Returns 'task', 'file', 'folder' or 'hub'."""
  if is_task(source):
    return 'task'
  if os.path.isdir(_folder(source)):
    return 'folder'
  if files.is_data_file(source):
    return 'file'
  kinds = ', '.join(files.READERS)
  if os.path.isfile(source):
    raise DataError(
      f'data file {source!r} is of no kind that is read ({kinds}); write it as'
      ' one of them, or unpack it'
    )
  if hub.is_hub_id(source):
    _require_no_path(source)
    return 'hub'
  raise DataError(
    f'data source {source!r} is none of reasoning_gym:TASK, a data file'
    f' ({kinds}), an existing folder and the owner/name of a dataset on the hub'
  )


def _require_no_path(source: str) -> None:
  """Refuses what has the form of a hub id, but looks like a path."""
  owner, _, name = source.partition(':')[0].partition('/')
  suffix = os.path.splitext(name)[1].lower()
  if owner in ('.', '..') or os.path.isdir(owner) or suffix in _PACKED:
    raise DataError(
      f'data source {source!r}: no such folder here, nor a data file; check the'
      ' path (a dataset on the hub of that name is read from a working folder'
      f' without {owner!r})'
    )


def _folder(source: str) -> str:
  """Returns a source without its split."""
  return source if os.path.isdir(source) else source.rpartition(':')[0]


def files_of(source: str, split: str) -> list[str]:
  """Returns the local files of a source; of a task or the hub there is none.

  Args:
    source: As in `check_source`.
    split: Likewise.

  Raises:
    DataError: A folder has no files of the split.
  """
  kind = _kind(source)
  if kind == 'folder':
    return folders.split_files(*_split_of(source, split))
  return [source] if kind == 'file' else []


def _split_of(source: str, split: str) -> tuple[str, str]:
  """Returns a folder, and which split of it is meant."""
  folder = _folder(source)
  named = source.removeprefix(folder).removeprefix(':')
  has_valid = split == 'eval' and folders.has_split(folder, 'valid')
  return folder, named or ('valid' if has_valid else 'train')


def folder_note(source: str, split: str) -> str:
  """Says, of a folder, which files are read and which are not; else ''.

  Args:
    source: As in `check_source`.
    split: Likewise.
  """
  if _kind(source) != 'folder':
    return ''
  return '; ' + folders.split_note(*_split_of(source, split))


def held_out_source(source: str) -> str | None:
  """Returns where a folder has its own held-out data; None where it has none.

  Args:
    source: What is trained on, as in `check_source`.
  """
  is_whole = os.path.isdir(source) and not is_task(source)
  if is_whole and folders.has_split(source, 'valid'):
    return f'{source}:valid'
  return None


def open_rows(
  source: str, *, split: str, stream: bool = False
) -> Iterator[files.Row]:
  """Yields the rows of a file, a folder or a dataset of the hub.

  Args:
    source: As in `check_source`; no task.
    split: Likewise.
    stream: Whether a dataset of the hub is fetched as it is read.

  Raises:
    DataError: The source is wrong or damaged.
  """
  if _kind(source) == 'hub':
    yield from hub.read_hub(source, stream=stream)
  for path in files_of(source, split):
    yield from files.read_file(path)


def draw_conversations(
  source: str, *, split: str, seed: int
) -> Iterator[Conversation]:
  """Yields the questions of a task, without end.

  Args:
    source: `reasoning_gym:TASK`.
    split: 'train' or 'eval', which share none.
    seed: Which stream of training questions.

  Raises:
    DataError: There is no such task, or it cannot be drawn.
  """
  return tasks.draw_task(source.removeprefix(_TASK), split=split, seed=seed)


def load_conversations(
  source: str,
  *,
  split: str,
  examples: int | None,
  seed: int = 0,
  columns: Columns = (),
  stream: bool = False,
) -> tuple[list[Conversation], str]:
  """Reads a source.

  Args:
    source: As in `check_source`.
    split: 'train' or 'eval'; it tells the two streams of a task apart.
    examples: How many to read, from the start; None reads all of them, which
      a task does not have.
    seed: Which stream of a task's training questions.
    columns: Pairs of a field and the column that holds it.
    stream: Whether a dataset of the hub is fetched only as far as it is read.

  Returns:
    The conversations, and a line that says what was read.

  Raises:
    DataError: The source is wrong, empty, or a row of it is malformed.
  """
  if is_task(source):
    if examples is None:
      raise DataError(
        f'{source!r} has no end; set data.{split}_examples to a number'
      )
    drawn = draw_conversations(source, split=split, seed=seed)
    rows = list(itertools.islice(drawn, examples))
    return rows, f'{source}: {len(rows)} {split} questions drawn'
  reader = RowReader(source, columns)
  located = reader.filled(open_rows(source, split=split, stream=stream))
  rows = [reader.read(*row) for row in itertools.islice(located, examples)]
  if not rows:
    raise DataError(f'{source!r} holds no row; give at least one')
  if split == 'eval' or not stream:  # else later rows are still to be read
    reader.check_seen()
  said = f'{source}: {len(rows)} rows read as {reader.format!r}'
  return rows, said + reader.unread() + folder_note(source, split)
