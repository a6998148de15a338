import json
import math
import os
import signal
import subprocess
import sys

import pytest

from jlora.checkpoints.run_folder import MetricsFile, RunFolder
from jlora.errors import CheckpointError, ConfigError

CONFIG = {
  'lora': {'rank': 16, 'targets': ['a', 'b']},
  'optim': {'learning_rate': 1e-3, 'clip': 1.0},
  'quant': None,
  'train': {'steps': 5},
}
HOLD = (
  'import sys, time\n'
  'from jlora.checkpoints.run_folder import RunFolder\n'
  'folder = RunFolder(sys.argv[1])\n'
  'print("held", flush=True)\n'
  'time.sleep(60)\n'
)


@pytest.fixture
def folder(tmp_path):
  with RunFolder(tmp_path / 'run') as folder:
    folder.write('config.json', json.dumps(CONFIG))
    yield folder


def changed(**sections):
  return json.dumps({**CONFIG, **sections})


def test_a_second_holder_is_refused(folder):
  with pytest.raises(ConfigError, match='another process'):
    RunFolder(folder.root)


def test_a_killed_holder_leaves_no_lock(tmp_path):
  command = [sys.executable, '-c', HOLD, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError, match='another process'):
      RunFolder(tmp_path)
    holder.send_signal(signal.SIGKILL)
  RunFolder(tmp_path).release()


def test_a_folder_left_empty_is_removed(tmp_path):
  with RunFolder(tmp_path / 'deep' / 'run') as folder:
    assert folder.root.is_dir()
  assert not (tmp_path / 'deep' / 'run').exists()


def test_a_folder_with_a_file_stays(folder):
  folder.release()
  assert json.loads(folder.path('config.json').read_text()) == CONFIG


def test_a_file_in_its_place_is_refused(tmp_path):
  (tmp_path / 'run').write_text('')
  with pytest.raises(ConfigError, match='--workdir'):
    RunFolder(tmp_path / 'run')


def test_a_write_replaces_the_whole_file(folder):
  folder.write('samples.md', 'long text')
  folder.write('samples.md', 'x')
  assert folder.path('samples.md').read_text() == 'x'
  assert {p.name for p in folder.root.iterdir()} == {
    '.lock',
    'config.json',
    'samples.md',
  }


def test_the_same_config_changes_nothing(folder):
  assert folder.check_config(json.dumps(CONFIG)) == {}


def test_a_learning_rate_may_change(folder):
  text = changed(optim={'learning_rate': 2e-3, 'clip': 1.0})
  assert folder.check_config(text) == {'optim.learning_rate': (1e-3, 2e-3)}


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ({'lora': {'rank': 8, 'targets': ['a', 'b']}}, 'lora.rank=16, .* has 8'),
    ({'lora': {'rank': 16, 'targets': ['a']}}, 'lora.targets='),
    ({'quant': {'format': 'nf4'}}, "quant.format=None, .* has 'nf4'"),
    ({'optim': {'learning_rate': 1e-3}}, 'optim.clip=1.0, .* has None'),
    ({'train': {'steps': 5, 'batch_size': 8}}, 'train.batch_size=None'),
  ],
)
def test_any_other_change_names_field_and_both_values(
  folder, sections, message
):
  with pytest.raises(ConfigError, match=message):
    folder.check_config(changed(**sections))


@pytest.mark.parametrize('text', ['{', '[]', None])
def test_a_damaged_config_is_refused(folder, text):
  folder.path('config.json').unlink()
  if text:
    folder.write('config.json', text)
  with pytest.raises(CheckpointError, match=r'config\.json cannot be read'):
    folder.check_config(json.dumps(CONFIG))


@pytest.fixture
def metrics(tmp_path):
  metrics = MetricsFile(tmp_path / 'metrics.jsonl', up_to=-1)
  for step in range(4):
    metrics.append({'step': step, 'loss': step / 2})
  return metrics


def test_lines_come_back_in_order(metrics):
  assert metrics.read() == [{'step': s, 'loss': s / 2} for s in range(4)]


def test_reopening_drops_what_will_be_written_again(metrics):
  again = MetricsFile(metrics.path, up_to=2)
  assert [line['step'] for line in again.read()] == [0, 1, 2]


@pytest.mark.parametrize('cut', range(1, 12))
def test_a_line_cut_off_by_a_kill_is_left_out(metrics, cut):
  os.truncate(metrics.path, metrics.path.stat().st_size - cut)
  again = MetricsFile(metrics.path, up_to=9)
  assert [line['step'] for line in again.read()] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_refused(metrics):
  metrics.path.write_text('{"step"\n' + metrics.path.read_text())
  with pytest.raises(CheckpointError, match='no JSON'):
    metrics.read()


def test_numbers_that_are_not_finite_are_null(metrics):
  metrics.append({'step': 4, 'loss': math.nan, 'norm': math.inf})
  assert metrics.path.read_text().splitlines()[-1] == (
    '{"step": 4, "loss": null, "norm": null}'
  )


def test_a_full_disk_costs_lines_and_not_the_run(metrics):
  import resource

  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = metrics.path.stat().st_size
  resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
  try:
    with pytest.warns(UserWarning, match='training goes on'):
      metrics.append({'step': 4})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  metrics.append({'step': 5})
  assert metrics.lost == 1
  assert [line['step'] for line in metrics.read()] == [0, 1, 2, 3, 5]
