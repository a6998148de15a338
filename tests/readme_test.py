"""The README's code runs as printed."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest

README = pathlib.Path(__file__).parent.parent / 'README.md'


def blocks(language: str) -> list[str]:
  pattern = r'^```(\w*)\n(.*?)^```$'  # all, or an end would begin a block
  found = re.findall(pattern, README.read_text(), re.DOTALL | re.MULTILINE)
  return [text for name, text in found if name == language]


@pytest.fixture(scope='module')
def ran():
  """What the names are after each block of code, and what was printed."""
  names: dict = {}
  states, printed = [], io.StringIO()
  with contextlib.redirect_stdout(printed):
    for block in blocks('python'):
      exec(compile(block, str(README), 'exec'), names)
      states.append(dict(names))
  return states, printed.getvalue()


def test_the_example_trains_a_model_that_is_not_ours(ran):
  names = ran[0][0]
  assert jnp.isfinite(names['loss'])
  assert set(names['trainable']) == {'Dense_0', 'Dense_1', 'Dense_2'}
  assert names['dense']['Dense_0']['kernel'].shape == (512, 128)


@pytest.mark.parametrize('place', [1, 2], ids=['linen', 'nnx'])
def test_a_model_of_your_own_takes_twelve_lines(ran, place):
  lines = [line for line in blocks('python')[place].splitlines() if line]
  assert len(lines) <= 12
  assert ran[0][place]['y'].shape == (2, 16, 64)
  assert set(ran[0][place]['trainable']) == {'query', 'key', 'value', 'out'}


def test_the_table_of_a_spec_is_the_one_shown(ran):
  assert ran[1] in blocks('')


def test_the_files_that_commands_name_exist():
  commands = '\n'.join(blocks('sh'))
  root = README.parent
  for name in re.findall(r'--config=(\S+)', commands):
    assert (root / name).is_file()
  for module in re.findall(r'python -m (jlora\.\w+)', commands):
    assert (root / f'{module.replace(".", "/")}.py').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('flag', ['--processes=2', 'device_count=4'])
def test_what_tries_many_devices_runs_as_printed(flag, tmp_path):
  (block,) = (text for text in blocks('sh') if flag in text)
  (tmp_path / 'experiments').symlink_to(README.parent / 'experiments')
  environment = os.environ | {'PYTHONPATH': str(README.parent)}
  environment['PATH'] = (
    f'{pathlib.Path(sys.executable).parent}:{environment["PATH"]}'
  )
  ended = subprocess.run(
    ['bash', '-c', block],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr
  (run,) = (tmp_path / 'runs').iterdir()
  assert (run / 'summary.json').exists(), ended.stderr
  assert re.search('parameters over [24] devices', ended.stdout)
