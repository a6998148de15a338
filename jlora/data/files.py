"""Rows of data files: JSON lines, JSON, Parquet, CSV, TSV and plain text.

Text is taken as it is written. The readers of `datasets` guess types: an
answer such as 2020-01-01 would become a timestamp, and 007 a 7. So Parquet,
which has types of its own, is read by pyarrow, and the others by the standard
library, which also knows the line.
"""

import csv
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jlora.data import lines
from jlora.errors import DataError

# Where a row stands, for messages, and its fields.
Row = tuple[str, Mapping[str, Any]]

_PARQUET = b'PAR1'
_BATCH = 1000  # rows of Parquet that are in memory together


def is_data_file(path: str) -> bool:
  """Returns whether a name is that of a file whose rows can be read."""
  return _suffix(path) in READERS


def _suffix(path: str) -> str:
  return pathlib.PurePath(path).suffix.lower()


def check_file(path: str, *, whole: bool = True) -> None:
  """Finds what is wrong with a file before anything parses it.

  Args:
    path: A file of one of the kinds in `READERS`.
    whole: Whether to look at all of it; else at its first lines.

  Raises:
    DataError: It is missing, empty, not UTF-8, no Parquet though it is called
      so, or a .jsonl file with a line above 16 MiB; with file and line.
  """
  if not os.path.isfile(path):
    raise DataError(f'data file {path!r} does not exist; check the path')
  try:
    if _suffix(path) == '.parquet':
      _check_parquet(path)
    elif _suffix(path) == '.jsonl':
      lines.check_lines(path, whole=whole)
    else:
      _check_text(path, whole)
  except OSError as error:
    raise DataError(f'data file {path!r} cannot be read: {error}') from error


def _check_text(path: str, whole: bool) -> None:
  empty = True
  with open(path, 'rb') as file:
    some = None if whole else lines.SOME
    for number, line in enumerate(itertools.islice(file, some), 1):
      line = line.removeprefix(lines.BOM) if number == 1 else line
      lines.check_line(path, number, line)
      empty = empty and not line.strip()
  if empty:
    raise DataError(f'data file {path!r} is empty; give it rows or text')


def _check_parquet(path: str) -> None:
  with open(path, 'rb') as file:
    start = file.read(4)
    file.seek(max(os.path.getsize(path) - 4, 0))
    end = file.read(4)
  if (start, end) != (_PARQUET, _PARQUET):
    raise DataError(
      f'data file {path!r} starts with {start!r} and ends with {end!r}, so it'
      ' is no whole Parquet file; copy or write it again'
    )


def read_file(path: str) -> Iterator[Row]:
  """Yields the rows of a file, one after another as they are asked for.

  Args:
    path: A .jsonl, .json (a list of rows, or an object with one list),
      .parquet, .csv or .tsv (with names in the first line), .txt or .md file
      (the whole of it is one row).

  Raises:
    DataError: The file is damaged; with file and row.
  """
  try:
    yield from READERS[_suffix(path)](path)
  except OSError as error:
    raise DataError(f'data file {path!r} cannot be read: {error}') from error
  except UnicodeDecodeError as error:
    raise DataError(
      f'{path}: byte {error.object[error.start]:#04x} is not UTF-8; save the'
      ' file as UTF-8'
    ) from error


def _read_json(path: str) -> Iterator[Row]:
  with open(path, encoding='utf-8-sig') as file:
    text = file.read()
  try:
    content = json.loads(text)
  except json.JSONDecodeError as error:
    if error.msg == 'Extra data':  # one object a line under another name
      yield from lines.read_lines(path)
      return
    raise DataError(
      f'{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno};'
      ' give a list of rows'
    ) from error
  except RecursionError as error:
    raise DataError(f'{path}: the JSON is nested too deeply') from error
  except ValueError as error:  # a number of thousands of digits
    raise DataError(f'{path}: {lines.first_line(error)}') from error
  for i, row in enumerate(_list_in(path, content)):
    if not isinstance(row, dict):
      raise DataError(f'{path}: row {i} is {row!r:.60}, not an object')
    yield f'{path}: row {i}', row


def _list_in(path: str, content: Any) -> list[Any]:
  """Returns the list of rows that a JSON file is, or has in one field."""
  if isinstance(content, list):
    return content
  found = content if isinstance(content, dict) else {}
  lists = [name for name, value in found.items() if isinstance(value, list)]
  if len(lists) != 1:
    raise DataError(
      f'{path}: a JSON {type(content).__name__} with the lists {lists}; give a'
      ' list of rows, or an object with one list'
    )
  return content[lists[0]]


def _read_parquet(path: str) -> Iterator[Row]:
  import pyarrow
  import pyarrow.parquet

  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      batches = file.iter_batches(batch_size=_BATCH)
      rows = (
        row
        for batch in batches
        for row in batch.to_pylist(maps_as_pydicts='strict')
      )
      for i, row in enumerate(rows):
        yield f'{path}: row {i}', without_none(row)
  except (pyarrow.ArrowException, KeyError, ValueError) as error:
    raise DataError(
      f'data file {path!r} cannot be read as Parquet:'
      f' {lines.first_line(error)}; write it again'
    ) from error


def without_none(value: Any) -> Any:
  """Returns a value of Arrow without the fields that are None, at any depth.

  A column has the same fields in every row; None stands where there is none.

  Args:
    value: A row, or what a column holds.
  """
  if isinstance(value, dict):
    return {k: without_none(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [without_none(v) for v in value]
  return value


def _read_csv(path: str) -> Iterator[Row]:
  dialect = 'excel-tab' if _suffix(path) == '.tsv' else 'excel'
  csv.field_size_limit(lines.MAX_LINE)
  with open(path, encoding='utf-8-sig', newline='') as file:
    rows = csv.reader(file, dialect, strict=True)
    try:
      names = next(rows, [])
      _check_header(path, names)
      for row in filter(None, rows):
        where = f'{path}:{rows.line_num}'
        if len(row) != len(names):
          raise DataError(
            f'{where}: {len(row)} fields, and the first line names'
            f' {len(names)}: {names}; quote fields that hold separators'
          )
        yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
      raise DataError(f'{path}:{rows.line_num}: {error}') from error


def _check_header(path: str, names: list[str]) -> None:
  if not names or len(set(names)) < len(names) or '' in names:
    raise DataError(
      f'{path}:1: the columns {names} are not named, or not all differently;'
      ' the first line names them'
    )


def _read_text(path: str) -> Iterator[Row]:
  with open(path, encoding='utf-8-sig') as file:
    yield path, {'text': file.read()}


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
  '.jsonl': lines.read_lines,
  '.json': _read_json,
  '.parquet': _read_parquet,
  '.csv': _read_csv,
  '.tsv': _read_csv,
  '.txt': _read_text,
  '.md': _read_text,
}
TEXT = ('.txt', '.md')
