import json
import pathlib
import subprocess
import sys

import pytest

from jlora.data.sources import (
  check_source,
  held_out_source,
  load_conversations,
)
from jlora.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('reasoning_gym:gdc', "did you mean 'gcd'"),
    ('missing.jsonl', "'missing.jsonl' does not exist"),
    ('rows.csv', "'rows.csv' does not exist"),
    ('owner/rows.json', "'owner/rows.json' does not exist"),
    ('rows', "'rows' is none of"),
    ('a/b/c', 'is none of'),
  ],
)
def test_a_wrong_source_is_refused_by_name(source, message):
  with pytest.raises(DataError, match=message):
    check_source(source)


@pytest.mark.parametrize(
  'source',
  [
    'reasoning_gym:gcd',
    'owner/name',
    'owner/na.me-2:test',
    'owner/name:main:train',
  ],
)
def test_a_right_source_passes(source):
  check_source(source)


def test_checking_imports_nothing_heavy():
  code = (
    'import sys; from jlora.data.sources import check_source;'
    'check_source("reasoning_gym:gcd"); print(*({"datasets", "transformers",'
    ' "torch", "reasoning_gym", "matplotlib"} & set(sys.modules)))'
  )
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert run.stdout.strip() == ''


def test_a_file_says_how_its_rows_were_read(write):
  path = write(GOOD, GOOD)
  rows, note = load_conversations(path, split='train', examples=None)
  assert len(rows) == 2
  assert note == f"{path}: 2 rows read as 'prompt/completion'"


def test_a_file_of_another_kind_is_refused_by_name(write):
  path = write('a: 1', name='rows.yaml')
  with pytest.raises(DataError, match=r'is of no kind that is read \(\.jsonl'):
    check_source(path)


@pytest.fixture
def folder(write, tmp_path):
  for name in ('train', 'valid', 'test'):
    row = json.dumps({'prompt': name, 'completion': 'b'})
    write(row, row, name=f'{name}.jsonl')
  return str(tmp_path)


def test_a_folder_is_read_by_its_splits(folder):
  def prompts(source, split):
    rows, _ = load_conversations(source, split=split, examples=None)
    return {row.messages[0].content for row in rows}

  assert prompts(folder, 'train') == {'train'}
  assert prompts(folder, 'eval') == {'valid'}
  assert prompts(f'{folder}:test', 'train') == {'test'}
  assert held_out_source(folder) == f'{folder}:valid'
  assert held_out_source(f'{folder}:test') is None


def test_all_files_of_a_folder_are_checked(folder, write):
  path = write('prompt,completion', name='train-2.csv')
  check_source(folder)
  pathlib.Path(path).write_bytes(b'\xe9')
  with pytest.raises(DataError, match=r'train-2\.csv:1: byte 0xe9'):
    check_source(folder)
  with pytest.raises(DataError, match="no files of the split 'extra'"):
    check_source(f'{folder}:extra')


def test_an_unreachable_dataset_is_named():
  with pytest.raises(DataError, match="'nobody/nothing' cannot be loaded"):
    load_conversations('nobody/nothing', split='train', examples=None)


def test_examples_stop_the_reading(write):
  path = write(GOOD, GOOD, 'not json')
  rows, _ = load_conversations(path, split='train', examples=2)
  assert len(rows) == 2


def test_a_task_needs_a_number_of_examples():
  with pytest.raises(DataError, match=r'no end; set data\.train_examples'):
    load_conversations('reasoning_gym:gcd', split='train', examples=None)


def test_a_task_gives_as_many_as_asked_for():
  rows, _ = load_conversations('reasoning_gym:gcd', split='train', examples=7)
  assert len(rows) == 7


def test_a_limited_read_finds_a_column_that_no_row_has(write):
  names = {'prompt': 'prompt', 'completion': 'completion', 'system': 'sytem'}
  path = write(GOOD, GOOD)
  with pytest.raises(DataError, match=r"has the column 'sytem'"):
    load_conversations(
      path, split='train', examples=1, columns=tuple(names.items())
    )


@pytest.mark.parametrize('source', ['data/trian', './data', 'x/x.jsonl.gz'])
def test_a_mistyped_path_is_no_dataset_of_the_hub(
  tmp_path, monkeypatch, source
):
  (tmp_path / 'data').mkdir()
  monkeypatch.chdir(tmp_path / 'data' if source == './data' else tmp_path)
  with pytest.raises(DataError, match='no such folder here'):
    check_source(source)


def test_blank_texts_are_left_out_and_counted(write):
  texts = ('', 'a', '  ', 'b')
  path = write(*(json.dumps({'text': text}) for text in texts))
  rows, note = load_conversations(path, split='train', examples=None)
  assert [row.reference for row in rows] == ['a', 'b']
  assert note.endswith("2 rows read as 'text'; 2 blank rows left out")


def test_the_first_row_is_read_when_a_source_is_checked(write):
  path = write('{"question": "a", "answer": "b"}')
  with pytest.raises(DataError, match='fit no known format'):
    check_source(path)
  columns = {'prompt': 'question', 'completion': 'answer'}
  check_source(path, columns=tuple(columns.items()))
