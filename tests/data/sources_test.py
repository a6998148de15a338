import subprocess
import sys

import pytest

from jlora.data.sources import check_source, load_conversations
from jlora.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('reasoning_gym:gdc', "did you mean 'gcd'"),
    ('missing.jsonl', "'missing.jsonl' does not exist"),
    ('rows.csv', "'rows.csv' is no .jsonl file"),
    ('owner/rows.json', 'is no .jsonl file'),
    ('rows', "'rows' is none of"),
    ('a/b/c', 'is none of'),
  ],
)
def test_a_wrong_source_is_refused_by_name(source, message):
  with pytest.raises(DataError, match=message):
    check_source(source)


@pytest.mark.parametrize(
  'source', ['reasoning_gym:gcd', 'owner/name', 'owner/na.me-2:test']
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


def test_a_task_needs_a_number_of_examples():
  with pytest.raises(DataError, match=r'no end; set data\.train_examples'):
    load_conversations('reasoning_gym:gcd', split='train', examples=None)


def test_a_task_gives_as_many_as_asked_for():
  rows, _ = load_conversations('reasoning_gym:gcd', split='train', examples=7)
  assert len(rows) == 7
