import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jlora.data.files import check_file, read_file
from jlora.errors import DataError

# Text that readers which guess types would change.
TEXTS = ['2020-01-01', ' 007', 'true', 'a, "b"\nc', 'é']
ROWS = [{'prompt': f'q{i}', 'completion': t} for i, t in enumerate(TEXTS)]


def write_json(path):
  path.write_text(json.dumps(ROWS))


def write_object(path):
  path.write_text(json.dumps({'version': 1, 'data': ROWS}))


def write_lines(path):
  path.write_text('\n'.join(map(json.dumps, ROWS)))


def write_parquet(path):
  pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_table(separator):
  def write(path):
    rows = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = (
      separator.join('"' + text.replace('"', '""') + '"' for text in row)
      for row in rows
    )
    path.write_text('\n'.join(quoted) + '\n\n', encoding='utf-8-sig')

  return write


@pytest.mark.parametrize(
  ('name', 'write', 'first'),
  [
    ('a.jsonl', write_lines, ':1'),
    ('a.json', write_json, ': row 0'),
    ('a.json', write_object, ': row 0'),
    ('a.json', write_lines, ':1'),
    ('a.parquet', write_parquet, ': row 0'),
    ('a[1]*.parquet', write_parquet, ': row 0'),
    ('a#b::c.parquet', write_parquet, ': row 0'),
    ('a.csv', write_table(','), ':2'),
    ('a.TSV', write_table('\t'), ':2'),
  ],
)
def test_every_kind_gives_the_same_rows(tmp_path, name, write, first):
  path = tmp_path / name
  write(path)
  check_file(str(path))
  rows = list(read_file(str(path)))
  assert [row for _, row in rows] == ROWS
  assert rows[0][0] == f'{path}{first}'


@pytest.mark.parametrize('name', ['book.txt', 'book.md'])
def test_a_text_is_one_row(tmp_path, name):
  path = tmp_path / name
  path.write_text('One.\n\nTwo.\n')
  check_file(str(path))
  assert list(read_file(str(path))) == [(str(path), {'text': 'One.\n\nTwo.\n'})]


def test_fields_that_a_parquet_row_does_not_have_are_left_out(tmp_path):
  path = str(tmp_path / 'a.parquet')
  rows = [{'turn': {'a': 'x'}}, {'turn': {'b': ['y', None]}}]
  pq.write_table(pa.Table.from_pylist(rows), path)
  assert [row for _, row in read_file(path)] == rows


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.json', b'', 'is empty'),
    ('a.csv', b'\xff\xfea', ':1: .*byte-order mark'),
    ('a.txt', b'a\n\xe9', ':2: byte 0xe9 is not UTF-8'),
    ('a.parquet', b'PAR1', None),
    ('a.parquet', b'{"text": "a"}', 'is no whole Parquet'),
    ('a.parquet', b'', 'is no whole Parquet'),
  ],
)
def test_a_damaged_file_is_refused_before_it_is_parsed(
  tmp_path, name, content, message
):
  path = tmp_path / name
  path.write_bytes(content)
  if message is None:  # found only when it is read
    check_file(str(path))
    with pytest.raises(DataError, match='cannot be read as Parquet'):
      list(read_file(str(path)))
    return
  with pytest.raises(DataError, match=message):
    check_file(str(path))


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.json', '{"a": \n1,}', r'a\.json:2: not JSON'),
    ('a.json', '3', 'a JSON int with the lists'),
    ('a.json', '{"a": [], "b": []}', r"lists \['a', 'b'\]; give a list"),
    ('a.json', '[{}, 7]', 'row 1 is 7, not an object'),
    ('a.json', '[' * 100_000, 'nested too deeply'),
    ('a.json', f'[{"1" * 5000}]', r'a\.json: .*4300 digits'),
    ('a.csv', 'a,b\n1,2\n1,2,3\n', r"a\.csv:3: 3 fields, .*\['a', 'b'\]"),
    ('a.csv', 'a,a\n1,2\n', r"columns \['a', 'a'\] are not named, or not all"),
    ('a.csv', '\na\n', 'columns .* are not named'),
    ('a.csv', 'a\n"b"c\n', r'a\.csv:2: '),
  ],
  ids=range(10),
)
def test_what_is_malformed_is_named_by_file_and_row(
  tmp_path, name, content, message
):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(DataError, match=message):
    list(read_file(str(path)))


def test_a_missing_file_is_named():
  with pytest.raises(DataError, match=r"'no\.csv' does not exist"):
    check_file('no.csv')


@pytest.mark.parametrize('name', ['a.csv', 'a.tsv', 'a.txt'])
def test_a_late_byte_that_is_not_utf_8_is_one_sentence(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b'text\n' + b'x\n' * 9999 + b'\xe9\n')
  check_file(str(path), whole=False)
  with pytest.raises(DataError, match='byte 0xe9 is not UTF-8'):
    list(read_file(str(path)))


def test_parquet_may_hold_maps_and_no_row(tmp_path):
  path = str(tmp_path / 'a.parquet')
  maps = pa.array([[('x', 1)], None], pa.map_(pa.string(), pa.int64()))
  table = pa.table({'text': ['a', 'b'], 'map': maps})
  pq.write_table(table, path)
  rows = [row for _, row in read_file(path)]
  assert rows == [{'text': 'a', 'map': {'x': 1}}, {'text': 'b'}]
  pq.write_table(table.slice(0, 0), path)
  assert list(read_file(path)) == []
