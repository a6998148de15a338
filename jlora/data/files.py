"""Conversations from local files, folders and the hub, through `datasets`.

A .jsonl file is read as lines of text: the JSON reader of `datasets` would
turn an answer such as "2020-01-01" into a timestamp, and has no line numbers.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jlora.data.conversations import Conversation, detect_format, read_row
from jlora.errors import DataError

_MAX_LINE = 16 << 20  # bytes; a longer line is no row but a broken file


def check_file(path: str) -> None:
  """Finds what is wrong with a file before anything parses it.

  Args:
    path: A .jsonl file.

  Raises:
    DataError: It is missing, empty, not UTF-8, starts with a byte-order mark,
      or has a line above 16 MiB; the message holds file and line.
  """
  if not os.path.isfile(path):
    raise DataError(f'data file {path!r} does not exist; check the path')
  try:
    empty = True
    for number, line in _raw_lines(path):
      _check_line(path, number, line)
      empty = empty and not line.strip()
  except OSError as error:
    raise DataError(f'data file {path!r} cannot be read: {error}') from error
  if empty:
    raise DataError(f'data file {path!r} is empty; give one JSON row a line')


def _raw_lines(path: str) -> Iterator[tuple[int, bytes]]:
  with open(path, 'rb') as file:
    lines = iter(lambda: file.readline(_MAX_LINE + 1), b'')
    yield from enumerate(lines, 1)


def _check_line(path: str, number: int, line: bytes) -> None:
  if len(line) > _MAX_LINE:
    raise DataError(
      f'{path}:{number}: the line is longer than {_MAX_LINE >> 20} MiB; write'
      ' one JSON row a line'
    )
  if line.startswith((b'\xef\xbb\xbf', b'\xff\xfe', b'\xfe\xff')):
    raise DataError(
      f'{path}:{number}: the line starts with the byte-order mark'
      f' {line[:3].hex()}; save the file as UTF-8 without it'
    )
  try:
    line.decode()
  except UnicodeDecodeError as error:
    raise DataError(
      f'{path}:{number}: byte {line[error.start]:#04x} is not UTF-8; save the'
      ' file as UTF-8'
    ) from error


def load_file(
  path: str, *, examples: int | None = None
) -> tuple[list[Conversation], str]:
  """Reads a .jsonl file, one JSON object a line.

  Args:
    path: The file.
    examples: Rows to read from its start; None reads all.

  Returns:
    The conversations in the file's order, and the format of its rows.

  Raises:
    DataError: The file or a row is malformed; with file and line.
  """
  check_file(path)
  import datasets

  # An absolute path with glob characters escaped: `datasets` reads patterns.
  pattern = ''.join(
    f'[{c}]' if c in '*?[' else c for c in os.path.abspath(path)
  )
  lines = datasets.load_dataset(
    'text', data_files=pattern, split='train', streaming=True
  )
  rows = (
    (f'{path}:{number}', line['text'])
    for number, line in enumerate(lines, 1)
    if line['text'].strip()
  )
  return _read_rows(itertools.islice(rows, examples), _parse)


def _parse(line: str) -> Mapping[str, Any]:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'not JSON: {error.msg} at column {error.colno}; write one object a line'
    ) from error
  except RecursionError as error:
    raise ValueError('the JSON is nested too deeply') from error
  if not isinstance(row, dict):
    raise ValueError(f'the line is a JSON {type(row).__name__}, not an object')
  return row


def load_hub(
  source: str, *, examples: int | None = None
) -> tuple[list[Conversation], str]:
  """Reads a dataset of the hub, or a local folder in the same layout.

  Args:
    source: `owner/name` or a folder, with the split after a colon where it is
      not 'train': `owner/name:test`.
    examples: Rows to read from its start; None reads all.

  Returns:
    The conversations in the dataset's order, and the format of its rows.

  Raises:
    DataError: It cannot be loaded, or a row is malformed; with its number.
  """
  import datasets

  name, _, split = source.partition(':')
  name = str(pathlib.Path(name).resolve()) if os.path.isdir(name) else name
  try:
    rows = datasets.load_dataset(name, split=split or 'train')
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise DataError(
      f'dataset {source!r} cannot be loaded: {_first_line(error)}; check its'
      ' name and split (owner/name:split), and the connection'
    ) from error
  if examples is not None:
    rows = rows.take(min(examples, len(rows)))
  located = ((f'{source}: row {i}', row) for i, row in enumerate(rows))
  return _read_rows(located, lambda row: row)


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_rows(
  rows: Iterable[tuple[str, Any]], parse: Callable[[Any], Mapping[str, Any]]
) -> tuple[list[Conversation], str]:
  """Reads located rows in the format of the first."""
  conversations, row_format = [], ''
  for where, raw in rows:
    try:
      row = parse(raw)
      row_format = row_format or detect_format(row)
      conversations.append(read_row(row, row_format))
    except ValueError as error:
      raise DataError(f'{where}: {error}') from error
  return conversations, row_format
