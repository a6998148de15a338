import json

import datasets
import pytest

from jlora.data import files
from jlora.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'


def test_rows_keep_their_order_and_exact_text(write):
  answers = ['2020-01-01', ' 007', '\u2028é', 'true']
  rows = [json.dumps({'prompt': 'q', 'completion': a}) for a in answers]
  conversations, row_format = files.load_file(write(*rows))
  assert [c.reference for c in conversations] == answers
  assert row_format == 'prompt/completion'


def test_examples_stop_the_reading(write):
  path = write(GOOD, GOOD, 'not json')
  assert len(files.load_file(path, examples=2)[0]) == 2


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column"),
    ('["a"]', 'a JSON list, not an object'),
    ('[' * 100_000, 'nested too deeply'),
    ('{"prompt": "a"}', "has no 'completion'"),
    ('{"prompt": "a", "completion": 3}', "'completion' is 3"),
    ('{"text": "another format"}', "has no 'prompt'"),
  ],
)
def test_a_malformed_row_is_named_by_file_and_line(write, line, message):
  path = write(GOOD, '', '   ', line)
  with pytest.raises(DataError, match=message) as error:
    files.load_file(path)
  assert str(error.value).startswith(f'{path}:4: ')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'is empty'),
    (b'\n \n', 'is empty'),
    (b'\xef\xbb\xbf{}\n', ':1: .*byte-order mark efbbbf'),
    ('{}'.encode('utf-16'), ':1: .*byte-order mark fffe'),
    (b'{}\n\xe9\n', ':2: byte 0xe9 is not UTF-8'),
    (b'{}\n' + b'x' * (17 << 20), ':2: .*longer than 16 MiB'),
  ],
)
def test_a_damaged_file_is_named_by_file_and_line(tmp_path, content, message):
  path = tmp_path / 'data.jsonl'
  path.write_bytes(content)
  with pytest.raises(DataError, match=message):
    files.check_file(str(path))


def test_a_name_with_glob_characters_is_one_file(write):
  path = write(GOOD, name='a[1]*.jsonl')
  assert len(files.load_file(path)[0]) == 1


def test_a_folder_is_read_like_the_hub(write, tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  (tmp_path / 'set').mkdir()
  write(GOOD, GOOD, GOOD, name='set/train.jsonl')
  write(GOOD, '{"prompt": "a", "completion": ""}', name='set/test.jsonl')
  folder = str(tmp_path / 'set')
  assert len(files.load_hub(folder)[0]) == 3
  assert len(files.load_hub(folder, examples=2)[0]) == 2
  with pytest.raises(DataError, match="set:test: row 1: 'completion' is ''"):
    files.load_hub(f'{folder}:test')
  with pytest.raises(DataError, match="set:dev' cannot be loaded"):
    files.load_hub(f'{folder}:dev')


def test_an_unreachable_dataset_is_named():
  with pytest.raises(DataError, match="'nobody/nothing' cannot be loaded"):
    files.load_hub('nobody/nothing')
