"""Parameters over eight devices train as on one, and move in 4 bits."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name('sharded_run.py')
MESHES = ['8,1,1', '1,8,1', '1,2,4', '2,2,2']


@pytest.fixture(
  scope='module',
  params=[
    ('even', 'nf4'),
    ('odd', 'plain'),
    ('odd', 'nf4'),
    ('smollm2', 'plain'),
    ('smollm2', 'nf4'),
  ],
  ids=' '.join,
)
def case(request):
  """Name of the config, whether it is quantized, and the report by mesh."""
  flags = '--xla_force_host_platform_device_count=8'
  ended = subprocess.run(
    [sys.executable, SCRIPT, *request.param],
    env=os.environ
    | {
      'XLA_FLAGS': flags,
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(SCRIPT.parents[2]),
    },
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr
  return *request.param, json.loads(ended.stdout)


@pytest.mark.parametrize('mesh', MESHES)
def test_training_is_that_of_one_device(case, mesh):
  report = case[2][mesh]
  assert max(report['losses']) <= 1e-5
  assert report['gradient'] <= 1e-5
  assert report['adapters'] <= 1e-5
  assert report['falls']


@pytest.mark.parametrize('mesh', MESHES)
def test_no_quantized_kernel_moves_as_floats(case, mesh):
  name, quantized, reports = case
  if quantized == 'plain' or name == 'odd':
    pytest.skip('its kernels are not quantized, or not cut as they should be')
  sides = {
    'even': [(128, 128), (128, 64), (128, 256)],
    'smollm2': [(576, 576), (576, 192), (576, 1536)],
  }[name]
  kernels = {tuple(sorted(shape)) for shape in sides}
  for dtype, shape in reports[mesh]['gathered']:
    real = tuple(sorted(n for n in shape if n > 1))
    assert dtype == 'u8' or real not in kernels, (dtype, shape)


def test_the_codes_of_a_layer_move_three_times_a_step(case):
  name, quantized, reports = case
  if (name, quantized) != ('even', 'nf4'):
    pytest.skip('counted where every kernel is cut as its rule says')
  moved = reports['1,8,1']['gathered']
  found = sum(math.prod(shape) for dtype, shape in moved if dtype == 'u8')
  weights = 2 * 128 * (128 + 64) + 3 * 128 * 256
  layer = weights // 2 + weights // 16  # codes and scales, a byte each
  # Forward, again for the backward pass, and decoded there: at most thrice.
  assert 2 * layer <= found <= 3 * layer


@pytest.mark.parametrize('mesh', MESHES)
def test_devices_share_the_work(case, mesh):
  name, _, reports = case
  if name != 'even':
    pytest.skip('sizes that do not divide leave work that all devices do')
  assert reports[mesh]['flops'] <= 1.2 / 8
