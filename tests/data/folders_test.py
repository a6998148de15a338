import pathlib

import pytest

from jlora.data.folders import has_split, split_files, split_note
from jlora.errors import DataError


@pytest.fixture
def make_folder(tmp_path):
  def make(*names):
    for name in names:
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text('{}')
    return str(tmp_path)

  return make


def names(paths, folder):
  return [pathlib.Path(p).relative_to(folder).as_posix() for p in paths]


@pytest.mark.parametrize(
  ('files', 'split', 'found'),
  [
    (['train.jsonl', 'valid.jsonl'], 'train', ['train.jsonl']),
    (['train.jsonl', 'valid.jsonl'], 'validation', ['valid.jsonl']),
    (['train.csv', 'dev.csv'], 'valid', ['dev.csv']),
    (['train.jsonl', 'extra.jsonl'], 'extra', ['extra.jsonl']),
    (
      ['data/train-1-of-2.parquet', 'data/train-0-of-2.parquet'],
      'train',
      ['data/train-0-of-2.parquet', 'data/train-1-of-2.parquet'],
    ),
    (['train/a.txt', 'test/b.txt', 'README.md'], 'test', ['test/b.txt']),
    (['a.txt', 'b.md', 'README.md', '.x.txt'], 'train', ['a.txt', 'b.md']),
    (['a.jsonl', 'notes.txt'], 'train', ['a.jsonl']),
    (['a.jsonl', 'my_test.jsonl'], 'test', ['my_test.jsonl']),
    (['latest.jsonl'], 'train', ['latest.jsonl']),
  ],
)
def test_files_belong_to_the_split_that_their_name_says(
  make_folder, files, split, found
):
  folder = make_folder(*files)
  assert names(split_files(folder, split), folder) == found
  assert has_split(folder, split)


def test_a_missing_split_lists_those_that_there_are(make_folder):
  folder = make_folder('train.jsonl', 'test-a.csv', 'test-b.csv')
  assert not has_split(folder, 'valid')
  with pytest.raises(DataError, match=r"'dev'; it has test \(2\), train \(1\)"):
    split_files(folder, 'dev')


def test_a_folder_without_data_is_refused(make_folder):
  with pytest.raises(DataError, match='has no data files: name one such as'):
    split_files(make_folder('weights.bin'), 'train')


def test_files_that_are_left_out_are_said(make_folder):
  folder = make_folder('train.jsonl', 'extra.jsonl', 'notes.txt')
  assert split_note(folder, 'train') == (
    "the files of 'train' are train.jsonl; left out: extra.jsonl, notes.txt"
  )


def test_the_same_file_under_two_suffixes_is_refused(make_folder):
  folder = make_folder('train.jsonl', 'train.csv', 'test.jsonl')
  with pytest.raises(DataError, match=r'train\.csv.*differ in their suffix'):
    split_files(folder, 'train')
