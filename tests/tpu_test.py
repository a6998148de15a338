"""The scripts for TPU VMs and SLURM do what their dry runs print."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sysconfig
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TPU = ROOT / 'tpu'
SCRIPTS = ['create', 'install', 'launch', 'logs', 'slurm', 'stop']
TPU_VM = 'gcloud compute tpus tpu-vm'
PLACE = {'NAME': 'n', 'ZONE': 'z'}
# Called with these settings and flags, a script prints these commands.
GOLDEN = {
  'create --accelerator=v5litepod-16': (
    f'{TPU_VM} create n --accelerator-type=v5litepod-16'
    ' --version=v2-alpha-tpuv5-lite --zone=z\n'
  ),
  'create --accelerator=v5p-128 --spot --project=p': (
    f'{TPU_VM} create n --accelerator-type=v5p-128'
    ' --version=v2-alpha-tpuv5 --spot --zone=z --project=p\n'
  ),
  'create --accelerator=v4-8 --runtime=r --queued': (
    'gcloud compute tpus queued-resources create n --node-id=n'
    ' --accelerator-type=v4-8 --runtime-version=r --zone=z\n'
  ),
  'install --commit=c0ffee': (
    f'git -C {ROOT} archive --format=tar.gz --prefix=jlora-code/'
    ' --output=/tmp/jlora-code.tar.gz c0ffee\n'
    f'{TPU_VM} scp /tmp/jlora-code.tar.gz n: --worker=all --zone=z\n'
    f"{TPU_VM} ssh n --worker=all '--command=set -e; rm -rf jlora-code;"
    ' tar -xzf jlora-code.tar.gz;'
    ' curl -LsSf https://astral.sh/uv/install.sh | sh;'
    ' ~/.local/bin/uv venv --allow-existing --seed --python=3.11 jlora-venv;'
    ' jlora-venv/bin/pip install --quiet --editable "./jlora-code[tpu]"\''
    ' --zone=z\n'
  ),
  'launch --config=c.py --workdir=/w --config.lora.rank=8': (
    f"{TPU_VM} ssh n --worker=all '--command=cd jlora-code || exit 1;"
    ' if pgrep -F ../jlora.pid -f jlora.train > /dev/null 2>&1;'
    ' then echo "$(hostname): a run is going on; tpu/stop.sh stops it" >&2;'
    ' exit 1; fi;'
    ' nohup ../jlora-venv/bin/python -m jlora.train --distributed'
    ' --config=c.py --workdir=/w --config.lora.rank=8'
    " >> ../jlora.log 2>&1 < /dev/null & echo $! > ../jlora.pid' --zone=z\n"
  ),
  'logs': (
    f"{TPU_VM} ssh n --worker=0 '--command=tail -n 100 -F jlora.log' --zone=z\n"
  ),
  'stop': (
    f"{TPU_VM} ssh n --worker=all '--command=pkill -TERM -F jlora.pid"
    ' -f jlora.train 2> /dev/null || { echo "$(hostname): no run"; exit 0; };'
    " while pgrep -F jlora.pid -f jlora.train > /dev/null; do sleep 1; done'"
    ' --zone=z\n'
  ),
  'stop --delete': f'{TPU_VM} delete n --quiet --zone=z\n',
  'stop --delete --queued': (
    'gcloud compute tpus queued-resources delete n --force --quiet --zone=z\n'
  ),
  'slurm --nodes=2 --gpus=8 --config=c.py --workdir=/w --time=1:00:00': (
    'sbatch --job-name=jlora --nodes=2 --ntasks-per-node=8 --gpus-per-node=8'
    ' --cpus-per-task=8 --signal=TERM@120 --output=jlora-%j.log'
    " --time=1:00:00 '--wrap=srun --cpus-per-task=8 --gpu-bind=none"
    ' --kill-on-bad-exit=0 --label python -m jlora.train --distributed'
    " --config=c.py --workdir=/w'\n"
  ),
}


@pytest.fixture
def call(tmp_path):
  """Runs a script; the commands that it calls only write down their words."""
  calls = tmp_path / 'calls'
  calls.touch()
  for name in ('gcloud', 'git', 'sbatch'):
    stand_in(tmp_path / name, f'printf \'%q \' {name} "$@" >> {calls}', 'echo')

  def run(line, **settings):
    done = run_script(shlex.split(line), tmp_path, settings)
    done.calls = shlex.split(calls.read_text())
    return done

  return run


def stand_in(path, *lines):
  path.write_text('\n'.join(['#!/usr/bin/env bash', *lines]) + '\n')
  path.chmod(0o755)


def run_script(words, programs, settings):
  path = f'{programs}{os.pathsep}{os.environ["PATH"]}'
  return subprocess.run(
    [TPU / f'{words[0]}.sh', *words[1:]],
    env={'PATH': path, **settings},
    capture_output=True,
    text=True,
    timeout=20,
  )


def test_shellcheck_finds_nothing():
  shellcheck = pathlib.Path(sysconfig.get_path('scripts')) / 'shellcheck'
  files = sorted(TPU.glob('*.sh'))
  assert [file.stem for file in files] == sorted([*SCRIPTS, 'settings'])
  for command in (shellcheck, '-x', '-P', 'SCRIPTDIR'), ('bash', '-n'):
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, '')


@pytest.mark.parametrize('line', GOLDEN)
def test_a_dry_run_prints_what_a_run_calls(call, line):
  dry = call(f'{line} --dry-run', **PLACE)
  assert (dry.returncode, dry.stdout, dry.stderr) == (0, GOLDEN[line], '')
  assert dry.calls == []
  wet = call(line, **PLACE)
  assert wet.returncode == 0
  assert wet.calls == shlex.split(dry.stdout)


@pytest.mark.parametrize(
  ('line', 'name'),
  [
    ('create --zone=z --accelerator=v6e-8', 'NAME'),
    ('create --name=n --accelerator=v6e-8', 'ZONE'),
    ('create --name=n --zone=z', 'ACCELERATOR'),
    ('create --name=n --zone=z --accelerator=v5e-8', 'RUNTIME'),
    ('install --zone=z', 'NAME'),
    ('launch --name=n --zone=z --workdir=/w', 'CONFIG'),
    ('launch --name=n --zone=z --config=c.py', 'WORKDIR'),
    ('logs --name=n', 'ZONE'),
    ('stop --name= --zone=z --delete', 'NAME'),
    ('slurm --config=c.py --workdir=/w', 'GPUS'),
  ],
)
def test_what_is_missing_is_named(call, line, name):
  done = call(line)
  assert done.returncode == 2
  script = line.split()[0]
  assert done.stderr.startswith(f'{script}.sh: {name} is missing')
  assert done.stderr.count('\n') == 1
  assert (done.stdout, done.calls) == ('', [])


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ('launch --config=c.py --workdir=gs://bucket/run', "'gs://bucket/run'"),
    ('launch --config=c.py --workdir=runs/x', "'runs/x'"),
    ('stop --delte', "'--delte'"),
    ('slurm 8', "'8'"),
  ],
)
def test_a_wrong_value_is_shown_and_nothing_runs(call, line, said):
  done = call(line, **PLACE)
  assert (done.returncode, done.calls) == (2, [])
  assert said in done.stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_is_the_comment_at_the_top(call, script):
  done = call(f'{script} --help')
  assert (done.returncode, done.calls) == (0, [])
  assert f'  tpu/{script}.sh --' in done.stdout
  assert '--dry-run' in done.stdout
  assert 'set -euo' not in done.stdout


@pytest.mark.skipif(not shutil.which('pgrep'), reason='needs procps')
def test_a_worker_runs_one_run_and_stops_it(tmp_path):
  worker = tmp_path / 'worker'
  (worker / 'jlora-code').mkdir(parents=True)
  (worker / 'jlora-venv/bin').mkdir(parents=True)
  stand_in(
    worker / 'jlora-venv/bin/python',
    "trap 'echo saved; exit 75' TERM",
    'echo "${@: -1}"',
    'while :; do sleep 0.02; done',
  )
  # As ssh does: a shell in the home folder, with the command as one text.
  stand_in(
    tmp_path / 'gcloud',
    f'cd {worker}',
    'for word; do case $word in --command=*) exec bash -c "${word#*=}" ;; esac',
    'done',
  )
  log = worker / 'jlora.log'
  field = "--config.lora.rank_pattern={'layers/[0-9]/.*': 8}"
  launch = ['launch', '--config=c.py', '--workdir=/w', field]
  try:
    for before in ('', f'{field}\nsaved\n'):  # the pid that is left is old
      assert run_script(launch, tmp_path, PLACE).returncode == 0
      wait_for(log, f'{before}{field}\n')
      again = run_script(launch, tmp_path, PLACE)
      assert again.returncode == 1
      assert 'a run is going on' in again.stderr
      assert run_script(['stop'], tmp_path, PLACE).returncode == 0
      assert log.read_text() == f'{before}{field}\nsaved\n'
  finally:
    stopped = run_script(['stop'], tmp_path, PLACE)
  assert stopped.returncode == 0
  assert 'no run' in stopped.stdout


def wait_for(path, text):
  end = time.monotonic() + 10
  while not path.exists() or path.read_text() != text:
    assert time.monotonic() < end, path.read_text()
    time.sleep(0.01)


def test_the_commands_of_the_readme_are_understood(call):
  blocks = re.findall(
    r'^```sh\n(.*?)^```$', (TPU / 'README.md').read_text(), re.DOTALL | re.M
  )
  text = '\n'.join(blocks).replace('\\\n', '')
  settings = dict(re.findall(r'(\w+)=(\S+)', text.splitlines()[0]))
  lines = re.findall(r'^tpu/(\w+)\.sh(.*)$', text, re.MULTILINE)
  assert {script for script, _ in lines} == set(SCRIPTS)
  for script, flags in lines:
    assert call(f'{script} {flags} --dry-run', **settings).returncode == 0
