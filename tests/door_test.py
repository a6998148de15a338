import sys
import warnings

import pytest
from absl import logging

from jlora import door, errors


@pytest.fixture
def leave(monkeypatch, capsys):
  """Enters a door with some arguments; gives exit code and stderr."""
  monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
  verbosity = logging.get_verbosity()

  def run(main, *arguments):
    monkeypatch.setattr(sys, 'argv', ['door', *arguments])
    with pytest.raises(SystemExit) as caught:
      door.enter(main)
    return caught.value.code, capsys.readouterr().err

  yield run
  logging.set_verbosity(verbosity)


def failing(error):
  def main():
    raise error

  return main


@pytest.mark.parametrize(('result', 'code'), [(None, 0), (0, 0), (75, 75)])
def test_what_main_returns_is_the_exit_code(leave, result, code):
  assert leave(lambda: result) == (code, '')


@pytest.mark.parametrize(
  ('kind', 'code'),
  [
    (errors.ConfigError, 2),
    (errors.DataError, 2),
    (errors.BaseModelError, 2),
    (errors.AdapterError, 2),
    (errors.CheckpointError, 3),
    (errors.NonFiniteError, 3),
  ],
)
def test_an_error_is_one_line_and_its_code(leave, kind, code):
  found, stderr = leave(failing(kind('rank 9 is\n too  large; use 8')))
  assert found == code
  assert stderr == 'jlora: rank 9 is too large; use 8\n'


def test_a_disk_that_refuses_stops_the_run(leave):
  code, stderr = leave(failing(OSError(28, 'No space left', '/disk/x')))
  assert code == 3
  assert stderr.startswith('jlora: ')
  assert '/disk/x' in stderr
  assert len(stderr.splitlines()) == 1


def test_a_bug_is_not_hidden(leave, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['door'])
  with pytest.raises(ZeroDivisionError):
    door.enter(lambda: 1 // 0)


@pytest.mark.parametrize('argument', ['--no_such_flag=3', 'stray'])
def test_an_unknown_argument_is_refused_by_name(leave, argument):
  code, stderr = leave(lambda: 0, argument)
  assert code == 2
  assert argument.strip('-').split('=')[0] in stderr
  assert len(stderr.splitlines()) == 1


def test_a_missing_config_names_one_to_try():
  class Flag:
    value = None

  with pytest.raises(errors.ConfigError, match='--config is missing; try'):
    door.config_of(Flag)
