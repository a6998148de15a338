"""Rows of a source as conversations, from columns of whatever names."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jlora.data.conversations import Conversation
from jlora.data.files import Row
from jlora.data.formats import (
  FIELDS,
  REQUIRED,
  columns_read,
  detect_format,
  read_row,
)
from jlora.errors import ConfigError, DataError

# Pairs of a field known here and the column that holds it.
Columns = Sequence[tuple[str, str]]


def make_columns(value: Any) -> tuple[tuple[str, Any], ...]:
  """Returns what a config gives as columns as pairs, each of them checked.

  Args:
    value: A mapping or pairs from fields to columns, or from sources to these.

  Raises:
    ConfigError: It is something else, or a field is unknown.
  """
  pairs = _pairs(value)
  nested = [not isinstance(column, str) for _, column in pairs]
  if not any(nested):
    return tuple(_check_field(field, column) for field, column in pairs)
  if not all(nested):
    raise ConfigError(
      f'data.columns is {value!r}; it takes columns for all sources alike, or'
      ' for each by its name, not both'
    )
  return tuple(
    (name, tuple(_check_field(*pair) for pair in _pairs(columns)))
    for name, columns in pairs
  )


def _pairs(value: Any) -> list[tuple[str, Any]]:
  pairs = value.items() if isinstance(value, Mapping) else value
  try:
    found = [(name, column) for name, column in pairs]
  except (TypeError, ValueError):
    found = [(None, None)]
  if not all(isinstance(name, str) for name, _ in found):
    raise ConfigError(
      f"data.columns is {value!r}; it takes a dict such as {{'prompt':"
      " 'question', 'completion': 'answer'}"
    )
  return found


def _check_field(field: str, column: Any) -> tuple[str, str]:
  if field not in FIELDS or not isinstance(column, str):
    raise ConfigError(
      f'data.columns reads {column!r} as {field!r}; it takes the name of a'
      f' column for one of the fields {", ".join(FIELDS)}'
    )
  return field, column


class RowReader:
  """Reads rows of one source, all in the format of the first.

  Attributes:
    format: As `conversations.detect_format` names it; '' before the first row.
  """

  def __init__(self, source: str, columns: Columns = ()):
    """Starts a source.

    Args:
      source: Its name, for messages.
      columns: Where given, only these columns are read, each as its field.
    """
    self.format = ''
    self._source = source
    self._columns = dict(columns)
    self._unseen = set(self._columns.values())
    self._first: list[str] = []
    self._blank = 0
    self._unread: collections.Counter[str] = collections.Counter()

  def read(self, where: str, row: Mapping[str, Any]) -> Conversation:
    """Returns a row as a conversation.

    Args:
      where: What names the row in a message.
      row: Its fields.

    Raises:
      DataError: The row is malformed, or lacks a column that is named.
    """
    if self._columns:
      row = self._renamed(where, row)
    try:
      self.format = self.format or detect_format(row)
      self._unread.update(row.keys() - columns_read(self.format))
      return read_row(row, self.format, where)
    except ValueError as error:
      raise DataError(f'{where}: {error}') from error

  def _renamed(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    self._first = self._first or sorted(map(str, row))
    self._unseen.difference_update(row)
    for field, column in self._columns.items():
      if field in REQUIRED and column not in row:
        raise DataError(
          f'{where}: there is no column {column!r}, which data.columns reads as'
          f' {field!r}; the row has {sorted(map(str, row))}'
        )
    return {
      field: row[column]
      for field, column in self._columns.items()
      if column in row
    }

  def filled(self, rows: Iterator[Row]) -> Iterator[Row]:
    """Yields rows but for those of plain text that is blank; it counts them.

    Args:
      rows: Where each stands, and its fields.
    """
    column = self._columns.get('text', 'text')
    for where, row in rows:
      text = row.get(column)
      if isinstance(text, str) and not text.strip() and self._is_text(row):
        self._blank += 1
      else:
        yield where, row

  def _is_text(self, row: Mapping[str, Any]) -> bool:
    if self._columns:
      return 'text' in self._columns and len(self._columns) == 1
    return (self.format or detect_format(row)) == 'text'

  def unread(self) -> str:
    """Returns what was not read, for the end of a line; maybe ''."""
    counts = ', '.join(
      f'{name} ({n:,} rows)' for name, n in sorted(self._unread.items())
    )
    blank = f'; {self._blank:,} blank rows left out' if self._blank else ''
    return blank + (f'; columns not read: {counts}' if counts else '')

  def check_seen(self) -> None:
    """Requires, once rows are read, that each named column was there.

    Raises:
      DataError: No row had one.
    """
    if self._unseen and self._first:
      raise DataError(
        f'{self._source}: no row that was read has the column'
        f' {min(self._unseen)!r}, which data.columns names; the first has'
        f' {self._first}'
      )


def columns_of(source: str, columns: Sequence[tuple[str, Any]]) -> Columns:
  """Returns the columns of one source.

  Args:
    source: Its name.
    columns: Pairs of a field and a column, for all sources alike, or of a
      source and such pairs.
  """
  by_source = {
    name: tuple(value) for name, value in columns if not isinstance(value, str)
  }
  return by_source.get(source, ()) if by_source else tuple(columns)
