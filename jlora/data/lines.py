"""JSON lines: one object a line, each named by its number."""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jlora.errors import DataError

BOM = b'\xef\xbb\xbf'  # may begin a file, as some editors have it
MAX_LINE = 16 << 20  # bytes; a longer line is no row but a broken file
SOME = 1000  # lines that are looked at where a file may be very large


def check_lines(path: str, *, whole: bool = True) -> None:
  """Finds what is wrong with the lines of a file before they are parsed.

  Args:
    path: A .jsonl file.
    whole: Whether to look at all of them; else at the first.

  Raises:
    DataError: It is empty, not UTF-8, or has a line above 16 MiB;
      the message holds file and line.
  """
  empty = True
  some = None if whole else SOME
  for number, line in itertools.islice(_raw_lines(path), some):
    _check_row(path, number, line)
    empty = empty and not line.strip()
  if empty:
    raise DataError(f'data file {path!r} is empty; give one JSON row a line')


def read_lines(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields where each row stands, and the row.

  Args:
    path: A .jsonl file.

  Raises:
    DataError: A line is malformed; with file and line.
  """
  for number, line in _raw_lines(path):
    _check_row(path, number, line)
    if line.strip():
      where = f'{path}:{number}'
      yield where, _parse(where, line.decode())


def _raw_lines(path: str) -> Iterator[tuple[int, bytes]]:
  with open(path, 'rb') as file:
    lines = iter(lambda: file.readline(MAX_LINE + 1), b'')
    for number, line in enumerate(lines, 1):
      yield number, line.removeprefix(BOM) if number == 1 else line


def _check_row(path: str, number: int, line: bytes) -> None:
  if len(line) > MAX_LINE:
    raise DataError(
      f'{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB; write'
      ' one JSON row a line'
    )
  check_line(path, number, line)


def check_line(path: str, number: int, line: bytes) -> None:
  """Requires that a line is UTF-8 without a byte-order mark.

  Args:
    path: The file, for the message.
    number: Of the line, for the message.
    line: Its bytes.

  Raises:
    DataError: It is not.
  """
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


def _parse(where: str, line: str) -> Mapping[str, Any]:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise DataError(
      f'{where}: not JSON: {error.msg} at column {error.colno}; write one'
      ' object a line'
    ) from error
  except RecursionError as error:
    raise DataError(f'{where}: the JSON is nested too deeply') from error
  except ValueError as error:  # a number of thousands of digits
    raise DataError(f'{where}: {first_line(error)}') from error
  if not isinstance(row, dict):
    raise DataError(
      f'{where}: the line is a JSON {type(row).__name__}, not an object'
    )
  return row


def first_line(error: BaseException) -> str:
  """Returns the first line of what an error says."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]
