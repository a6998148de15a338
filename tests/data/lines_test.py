import json

import pytest

from jlora.data.files import check_file
from jlora.data.lines import read_lines
from jlora.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'


def test_rows_keep_their_order_and_exact_text(write):
  texts = ['2020-01-01', ' 007', '\u2028é', 'true']
  path = write(*(json.dumps({'text': text}) for text in texts))
  rows = list(read_lines(path))
  assert [row['text'] for _, row in rows] == texts
  assert [where for where, _ in rows] == [f'{path}:{i}' for i in (1, 2, 3, 4)]


def test_nothing_is_read_before_it_is_needed(write):
  rows = read_lines(write(GOOD, GOOD, 'not json'))
  assert next(rows)[1] == next(rows)[1] == json.loads(GOOD)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column"),
    ('["a"]', 'a JSON list, not an object'),
    pytest.param(f'{{"a": {"1" * 5000}}}', '4300 digits', id='digits'),
    pytest.param('[' * 100_000, 'nested too deeply', id='deep'),
  ],
)
def test_a_malformed_line_is_named_by_file_and_line(write, line, message):
  path = write(GOOD, '', '   ', line)
  with pytest.raises(DataError, match=message) as error:
    list(read_lines(path))
  assert str(error.value).startswith(f'{path}:4: ')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'is empty'),
    (b'\n \n', 'is empty'),
    (b'{}\n\xef\xbb\xbf{}\n', ':2: .*byte-order mark efbbbf'),
    ('{}'.encode('utf-16'), ':1: .*byte-order mark fffe'),
    (b'{}\n\xe9\n', ':2: byte 0xe9 is not UTF-8'),
    pytest.param(
      b'{}\n' + b'x' * (17 << 20), ':2: .*longer than 16 MiB', id='long'
    ),
  ],
)
def test_a_damaged_file_is_named_by_file_and_line(tmp_path, content, message):
  path = tmp_path / 'data.jsonl'
  path.write_bytes(content)
  with pytest.raises(DataError, match=message):
    check_file(str(path))


def test_a_byte_order_mark_may_begin_a_file(tmp_path):
  path = tmp_path / 'data.jsonl'
  path.write_text(GOOD, encoding='utf-8-sig')
  check_file(str(path))
  assert [row for _, row in read_lines(str(path))] == [json.loads(GOOD)]
