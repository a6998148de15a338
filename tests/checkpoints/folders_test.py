import json
import pathlib
import subprocess
import sys

import pytest

from jlora.checkpoints.folders import replacing
from jlora.errors import CheckpointError, ConfigError

# Kills a child at every line that runs of folders.py and of shutil in turn,
# until one gets through.
KILLER = """
import json, os, pathlib, shutil, sys
from jlora.checkpoints import folders

def write(folder, text):
  with folders.replacing(folder, known=lambda name: True) as new:
    (new / 'a').write_text(text)
    (new / 'b').write_text(text)

def killed_at(line, folder):
  seen = [0]
  def trace(frame, event, _):
    if frame.f_code.co_filename not in (folders.__file__, shutil.__file__):
      return None
    if event == 'line':
      seen[0] += 1
      if seen[0] == line:
        os._exit(9)
    return trace
  if os.fork() == 0:
    sys.settrace(trace)
    write(folder, 'new')
    os._exit(0)
  return os.waitstatus_to_exitcode(os.wait()[1]) == 9

def content(folder):
  return {path.name: path.read_text() for path in folder.iterdir()}

found, line, alive = [], 0, False
while not alive:
  line += 1
  parent = pathlib.Path(sys.argv[1]) / str(line)
  write(parent / 'x', 'old')
  alive = not killed_at(line, parent / 'x')
  folders.restore_folder(parent / 'x')
  found.append(content(parent / 'x'))
  write(parent / 'x', 'next')
  found[-1]['left'] = [p.name for p in parent.iterdir()]
print(json.dumps(found))
"""


def write(folder, **files):
  known = {'a', 'b'}.__contains__
  with replacing(folder, known=known) as new:
    for name, text in files.items():
      (new / name).write_text(text)


def contents(folder):
  return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_kill_at_any_line_leaves_the_old_or_the_new_folder(tmp_path):
  run = subprocess.run(
    [sys.executable, '-c', KILLER, tmp_path],
    capture_output=True,
    check=True,
    timeout=120,
  )
  found = json.loads(run.stdout)
  old = {'a': 'old', 'b': 'old', 'left': ['x']}
  new = {'a': 'new', 'b': 'new', 'left': ['x']}
  assert len(found) > 30
  assert all(content in (old, new) for content in found)
  assert found[0] == old
  assert found[-1] == new


def test_a_failed_write_keeps_the_old_folder_and_leaves_nothing(tmp_path):
  write(tmp_path / 'x', a='old')
  with pytest.raises(CheckpointError, match='File name too long'):
    write(tmp_path / 'x', a='half', **{'b' * 300: ''})
  assert [path.name for path in tmp_path.iterdir()] == ['x']
  assert contents(tmp_path / 'x') == {'a': 'old'}


def test_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
  write(tmp_path / 'x', a='old')
  rename = pathlib.Path.rename

  def fail_for_new(path, target):
    if path.name.endswith('-new'):
      raise OSError(5, 'Input/output error')
    return rename(path, target)

  monkeypatch.setattr(pathlib.Path, 'rename', fail_for_new)
  with pytest.raises(CheckpointError, match='Input/output error'):
    write(tmp_path / 'x', a='new')
  assert contents(tmp_path / 'x') == {'a': 'old'}


def test_a_failed_write_after_a_killed_one_keeps_the_old_folder(tmp_path):
  write(tmp_path / '.x.jlora-old', a='old')
  with pytest.raises(CheckpointError):
    write(tmp_path / 'x', a='half', **{'b' * 300: ''})
  assert contents(tmp_path / 'x') == {'a': 'old'}


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  with (
    pytest.raises(ConfigError, match=r'thesis\.tex'),
    replacing(tmp_path, known={'a'}.__contains__),
  ):
    pytest.fail('it began to write')
  assert contents(tmp_path) == {'thesis.tex': 'years of work'}


def test_a_file_is_not_replaced(tmp_path):
  (tmp_path / 'x').write_text('kept')
  with pytest.raises(ConfigError, match='is a file'):
    write(tmp_path / 'x', a='new')
  assert contents(tmp_path) == {'x': 'kept'}


def test_missing_parents_are_made(tmp_path):
  write(tmp_path / 'runs' / 'x', a='new')
  assert contents(tmp_path / 'runs' / 'x') == {'a': 'new'}


def test_a_relative_folder_is_replaced_in_place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(pathlib.Path('x'), a='old')
  write('x', a='new')
  assert contents(tmp_path / 'x') == {'a': 'new'}
