"""Several processes load and train as one does, each with its own part."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name('processes_run.py')
DEVICES = 4


@pytest.fixture(scope='module')
def report_of(tiny_base, tmp_path_factory):
  """Returns what each of so many processes reports."""
  folder = tmp_path_factory.mktemp('processes')

  @functools.cache
  def run(count):
    if count > 1:
      run(1)  # leaves what the others compare with
    with socket.socket() as free:
      free.bind(('localhost', 0))
      place = f'localhost:{free.getsockname()[1]}'
    flags = f'--xla_force_host_platform_device_count={DEVICES // count}'
    environment = os.environ | {
      'XLA_FLAGS': f'{flags} --xla_backend_optimization_level=0',
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(SCRIPT.parents[2]),
    }
    started = [
      subprocess.Popen(
        [sys.executable, SCRIPT, tiny_base, folder, place, f'{count}', f'{i}'],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(count)
    ]
    ended = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
      assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]

  return run


CASES = [
  *((1, f'nf4 {lora}') for lora in ('lora', 'dora', 'rows', 'pissa')),
  *((2, f'nf4 {lora}') for lora in ('lora', 'dora', 'rows', 'pissa')),
  *((count, 'plain lora') for count in (1, 2, 4)),
  (4, 'nf4 lora'),
]


@pytest.mark.parametrize(('count', 'case'), CASES)
def test_what_is_loaded_is_what_one_device_loads(report_of, case, count):
  for report in report_of(count):
    assert report[case]['frozen'] == 0
    # The lengths of DoRA's columns are sums over parts of them.
    assert report[case]['trainable'] <= (1e-6 if 'dora' in case else 0)


@pytest.mark.parametrize(
  ('count', 'case'),
  # A decomposition needs its kernel whole.
  [(count, case) for count, case in CASES if 'pissa' not in case],
)
def test_a_process_keeps_its_part_of_each_kernel_once(report_of, case, count):
  for report in report_of(count):
    assert report[case]['read'] <= 1 / count


@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('case', ['nf4 lora', 'plain lora'])
def test_training_is_that_of_one_device(report_of, case, count):
  for report in report_of(count):
    print(count, case, report[case])  # pytest -rP shows it
    assert report[case]['losses'] <= 1e-5
    assert report[case]['adapters'] <= 1e-5
