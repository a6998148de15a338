import datasets
import pytest

from jlora.data.hub import is_hub_id, read_hub
from jlora.errors import DataError


@pytest.mark.parametrize(
  ('source', 'called'),
  [
    ('a/b', (('a/b', None), 'train', False)),
    ('a/b:test', (('a/b', None), 'test', False)),
    ('a/b-1.c:main:train', (('a/b-1.c', 'main'), 'train', True)),
  ],
)
def test_names_say_config_and_split(monkeypatch, source, called):
  calls = []

  def load(*names, split, streaming):
    calls.append((names, split, streaming))
    return [{'text': 'x', 'more': None}]

  monkeypatch.setattr(datasets, 'load_dataset', load)
  rows = list(read_hub(source, stream=called[2]))
  assert rows == [(f'{source}: row 0', {'text': 'x'})]
  assert calls == [called]


@pytest.mark.parametrize('source', ['a', 'a/b/c', 'a/b:', 'a/b:x:y:z', '/b'])
def test_other_names_are_none_of_the_hub(source):
  assert not is_hub_id(source)


def test_what_cannot_be_loaded_is_named(monkeypatch):
  def load(*_, **__):
    raise ValueError('Unknown split "x".\nmore')

  monkeypatch.setattr(datasets, 'load_dataset', load)
  with pytest.raises(DataError, match=r"'a/b:x' cannot be loaded: Unknown"):
    list(read_hub('a/b:x'))


def test_a_connection_that_breaks_while_rows_come_is_named(monkeypatch):
  class ClientError(Exception):
    pass

  def load(*_, **__):
    yield {'text': 'a'}
    raise ClientError('connection reset')

  monkeypatch.setattr(datasets, 'load_dataset', load)
  rows = read_hub('a/b', stream=True)
  assert next(rows)[1] == {'text': 'a'}
  with pytest.raises(DataError, match="'a/b' cannot be loaded: connection"):
    next(rows)
