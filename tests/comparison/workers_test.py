import importlib.util
import json
import os
import signal
import sys
import threading

import pytest

from jlora import config
from jlora.comparison import workers

SPEC = config.resolve(
  {'data': {'train': 'a.jsonl'}, 'train': {'steps': 2}, 'quant': {}, 'seed': 3}
)


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Returns a function that puts a program in the place of jlora.train."""

  def use(text):
    path = tmp_path / 'program.py'
    path.write_text(text)
    monkeypatch.setattr(workers, '_TRAIN', (sys.executable, str(path)))

  return use


def test_a_run_is_given_its_own_config_and_folder(program, tmp_path):
  program(f'import sys; open("{tmp_path}/argv", "w").write(str(sys.argv[1:]))')
  assert workers.train_apart(SPEC, tmp_path / 'run')
  assert (tmp_path / 'argv').read_text() == str(
    [
      f'--config={tmp_path}/run/experiment.py',
      f'--workdir={tmp_path}/run',
    ]
  )


def test_the_written_experiment_is_the_same_run(program, tmp_path):
  program('')
  workers.train_apart(SPEC, tmp_path / 'run')
  found = importlib.util.spec_from_file_location(
    'experiment', tmp_path / 'run' / 'experiment.py'
  )
  experiment = importlib.util.module_from_spec(found)
  found.loader.exec_module(experiment)
  assert config.resolve(experiment.get_config()) == SPEC


def test_a_stopped_run_has_not_ended(program, tmp_path):
  program('raise SystemExit(75)')
  assert not workers.train_apart(SPEC, tmp_path)


@pytest.mark.parametrize('code', [2, 3])
def test_a_refusal_is_passed_on_with_its_exit_code(program, tmp_path, code):
  program(
    'import sys; print("noise\\njlora: warning: w\\njlora: no rank 0",'
    f' "\\n", file=sys.stderr); sys.exit({code})'
  )
  with pytest.raises(workers.WorkerError, match=r'run: no rank 0') as caught:
    workers.train_apart(SPEC, tmp_path / 'run')
  assert caught.value.exit_code == code


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('raise ValueError', 'exit code 1'),
    ('import os; os.kill(os.getpid(), 9)', 'signal 9, perhaps for want of'),
  ],
)
def test_a_crash_names_the_log(program, tmp_path, text, said):
  program(text)
  with pytest.raises(workers.WorkerError, match=said) as caught:
    workers.train_apart(SPEC, tmp_path)
  assert caught.value.exit_code == 1
  assert 'stderr.log' in str(caught.value)


def test_warnings_of_a_run_are_shown(program, tmp_path, capsys):
  program('import sys; print("a\\njlora: warning: idle", file=sys.stderr)')
  workers.train_apart(SPEC, tmp_path)
  assert capsys.readouterr().err == 'jlora: warning: idle\n'


def test_a_signal_reaches_the_run_once_and_as_sigterm(program, tmp_path):
  received = tmp_path / 'received'
  program(f"""
import signal, time, sys
got = []
signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
open({str(tmp_path / 'ready')!r}, 'w').close()
while not got:
  time.sleep(0.01)
time.sleep(0.6)  # a second signal would come now
open({str(received)!r}, 'w').write(str(got))
sys.exit(75)
""")

  def interrupt():
    while not (tmp_path / 'ready').exists():
      waited.wait(0.01)
    os.kill(os.getpid(), signal.SIGINT)

  waited = threading.Event()
  thread = threading.Thread(target=interrupt)
  thread.start()
  try:
    assert not workers.train_apart(SPEC, tmp_path / 'run')
  finally:
    thread.join()
  assert json.loads(received.read_text()) == [signal.SIGTERM]
