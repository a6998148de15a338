"""Facts of jlora.planning.planner."""

import dataclasses

import pytest

from jlora.errors import ConfigError
from jlora.parallel.machines import find_machine
from jlora.planning.planner import Planner


@pytest.fixture(scope='module')
def planner(small):
  return Planner(small, find_machine('cpu'))


def test_a_run_is_compiled_once(planner, make_spec):
  spec = planner.prepare(make_spec(train__batch_size=1))
  before = planner.compiles
  first = planner.estimate(spec)
  assert planner.estimate(spec) is first
  assert planner.compiles == before + 1
  assert first.compiled
  assert first.fits


def test_operations_are_those_of_the_products(planner, make_spec):
  """Kernels forward, again, and backward; the head and attention likewise.

  The result of a layer's last product is not needed again. Attention's scores
  are made again backward, and a quarter of them, above the diagonal, never.
  """
  spec = planner.prepare(make_spec(train__batch_size=1, lora__rank=1))
  tokens, layers = 256, 3
  kernels = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512
  attention = (2 + 2 + 5) * 2 * 3 * tokens // 4 * 128
  layer = 3 * 2 * kernels - 2 * 128 * 512 + attention
  expected = tokens * (layers * layer + 2 * 2 * 128 * 2048)
  assert expected < planner.flops(spec) < 1.1 * expected  # and the adapters


def test_parts_between_steps_are_those_of_the_arrays(planner, make_spec):
  spec = planner.prepare(make_spec(train__batch_size=1, lora__rank=4))
  parts = planner.estimate(spec).parts
  kernels = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512
  assert 0.5 < parts['frozen, quantized'] / (3 * kernels) < 0.53
  sides = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 512)
  assert parts['trainable'] == 4 * 3 * 4 * sides
  assert 0 <= parts['optimizer state'] - 2 * parts['trainable'] < 64


@pytest.mark.parametrize(('target', 'size'), [('cpu', 4), ('h100', 2)])
def test_auto_is_the_dtype_of_the_target(
  make_counting, make_spec, target, size
):
  planner = make_counting(target)
  parts = planner.count(planner.prepare(make_spec())).parts
  norms = 3 * 2 * 128 + 128
  assert parts['frozen, dense'] == size * (2048 * 128 + norms)


def test_many_devices_share_the_parameters_unless_told(
  make_counting, make_spec
):
  planner = make_counting('v5e-8')
  spec = planner.prepare(make_spec(train__batch_size=8))
  assert spec.mesh.sizes == (1, 8, 1)
  spec = planner.prepare(make_spec(mesh__data=8, train__batch_size=8))
  assert spec.mesh.sizes == (8, 1, 1)


def test_rows_that_devices_cannot_share_are_refused(make_counting, make_spec):
  planner = make_counting('v5e-16')
  with pytest.raises(ConfigError, match='16 devices cannot share'):
    planner.prepare(make_spec())


def test_without_a_compiler_it_counts_and_says_why(make_counting, make_spec):
  planner = make_counting('h100')
  estimate = planner.estimate(planner.prepare(make_spec()))
  assert not estimate.compiled
  assert planner.missing == 'no compiler for h100'
  assert 'counted peak (not compiled)' in dict(estimate.rows())


def test_what_is_too_large_does_not_fit(make_counting, make_spec):
  planner = make_counting('h100', memory=1 << 20)
  estimate = planner.estimate(planner.prepare(make_spec()))
  assert not estimate.fits
  assert 'does not fit' in estimate.verdict()
  refused = dataclasses.replace(estimate, peak=0, refused=True)
  assert not refused.fits


def test_moments_on_the_host_are_not_counted_on_a_gpu(make_counting, make_spec):
  planner = make_counting('h100')
  plain, away = (
    planner.estimate(planner.prepare(make_spec(optim__offload=offload)))
    for offload in (False, True)
  )
  moments = 2 * plain.parts['trainable']
  assert plain.parts['optimizer state'] >= moments
  assert away.parts['optimizer state'] < 64  # counters
  assert plain.peak - moments <= away.peak < plain.peak


def test_weights_merged_for_answers_are_counted_for_each_device(
  make_counting, make_spec
):
  kernels = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512)
  for target, devices in (('h100', 1), ('v5e-4', 4)):
    planner = make_counting(target)
    spec = planner.prepare(make_spec(eval__merge=True, train__batch_size=4))
    assert planner.merged(spec) == 2 * kernels / devices  # in bfloat16
