"""Parameters over eight devices train as on one, and move in 4 bits."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name('sharded_run.py')
MESHES = ['8,1,1', '1,8,1', '1,2,4', '2,2,2']


CASES = [
  ('even', 'nf4'),
  ('odd', 'plain'),
  ('odd', 'nf4'),
  pytest.param(('smollm2', 'plain'), marks=pytest.mark.slow),
  ('smollm2', 'nf4'),
]


@functools.cache
def report_of(config, quantized):
  """What sharded_run.py reports, by mesh."""
  flags = '--xla_force_host_platform_device_count=8'
  ended = subprocess.run(
    [sys.executable, SCRIPT, config, quantized],
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
  return json.loads(ended.stdout)


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('case', CASES, ids=' '.join)
def test_training_is_that_of_one_device(case, mesh):
  report = report_of(*case)[mesh]
  distances = {
    name: report[name] for name in ('losses', 'gradient', 'adapters')
  }
  print(*case, mesh, distances)  # pytest -rP shows it
  assert max(distances['losses']) <= 1e-5
  assert distances['gradient'] <= 1e-5
  assert distances['adapters'] <= 1e-5
  assert report['falls']


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize(
  ('config', 'sides'),
  [
    ('even', [(128, 128), (128, 64), (128, 256)]),
    ('smollm2', [(576, 576), (576, 192), (576, 1536)]),
  ],
)
def test_no_quantized_kernel_moves_as_floats(config, sides, mesh):
  # By their size, for a kernel may move as blocks; 'tensor' leaves it cut.
  kernels = {math.prod(shape) // int(mesh[-1]) for shape in sides}
  for dtype, shape in report_of(config, 'nf4')[mesh]['gathered']:
    assert dtype == 'u8' or math.prod(shape) not in kernels, (dtype, shape)


# Where every kernel is cut as its rule says. The sizes do not depend on the
# number of layers, whose program is in the step once.
@pytest.mark.parametrize(
  ('config', 'width', 'shared', 'mlp', 'block'),
  [('even', 128, 64, 256, 16), ('smollm2', 576, 192, 1536, 64)],
)
def test_the_codes_of_a_layer_move_three_times_a_step(
  config, width, shared, mlp, block
):
  moved = report_of(config, 'nf4')['1,8,1']['gathered']
  found = sum(math.prod(shape) for dtype, shape in moved if dtype == 'u8')
  weights = 2 * width * (width + shared) + 3 * width * mlp
  layer = weights // 2 + weights // block  # codes and scales, a byte each
  # Forward, again for the backward pass, and decoded there: at most thrice.
  assert 2 * layer <= found <= 3 * layer


@pytest.mark.parametrize('mesh', MESHES)
def test_devices_share_the_work(mesh):
  """Of sizes that divide; others leave work that all devices do."""
  assert report_of('even', 'nf4')[mesh]['flops'] <= 1.2 / 8


def test_merged_weights_lie_as_their_codes_and_answer_as_on_one_device():
  report = report_of('even', 'nf4')['merged']
  assert report['distance'] <= 1e-6
  assert report['share'] == 1 / 4  # fsdp and tensor cut them, data does not
  assert report['counted']
  one, many = report['tokens']
  assert many == one
  assert len(set(one)) > 4
