import pathlib

import pytest

from jlora.data import fingerprints
from jlora.data.fingerprints import with_sources


@pytest.mark.parametrize('ends_only', [False, True])
def test_other_bytes_of_a_file_give_another_digest(
  write, monkeypatch, ends_only
):
  path = write('{"text": "a"}', '{"text": "b"}')
  if ends_only:
    monkeypatch.setattr(fingerprints, '_WHOLE', 8)
    monkeypatch.setattr(fingerprints, '_END', 8)
  before = with_sources('d', [path])
  assert with_sources('d', [path]) == before
  assert with_sources('e', [path]) != before
  for old, new in (('"b"', '"c"'), ('"b"}', '"b"}\n')):
    text = pathlib.Path(path).read_text()
    pathlib.Path(path).write_text(text.replace(old, new))
    assert with_sources('d', [path]) != before
    pathlib.Path(path).write_text(text)
  assert with_sources('d', [path]) == before


def test_what_is_no_file_does_not_count():
  one, other = (with_sources('d', [s]) for s in ('o/n', 'reasoning_gym:gcd'))
  assert one == other
