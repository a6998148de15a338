"""Facts of jlora.planning.report and of sweeps."""

import io
import json

import pytest
from rich.console import Console

from jlora.planning import report
from jlora.planning.sweep import sweep_lengths


@pytest.fixture
def console():
  return Console(file=io.StringIO(), soft_wrap=True, markup=False)


def said(console):
  return console.file.getvalue()


def test_a_plan_is_printed_and_written(
  make_counting, make_spec, console, tmp_path
):
  planners = [make_counting('h100'), make_counting('rtx4090')]
  report.plan(planners, make_spec(), console, out=tmp_path)
  for text in ('relative a6000', 'no compiler for h100', 'largest microbatch'):
    assert text in said(console)
  assert 'merged' not in said(console)
  first, second = json.loads((tmp_path / 'plan.json').read_text())
  assert (first['target'], second['target']) == ('h100', 'rtx4090')
  assert first['peak'] == sum(first['bytes'].values())
  assert first['fits']
  assert second['relative']
  lines = (tmp_path / 'plan.md').read_text().splitlines()
  assert lines[0] == '| target | what | value |'
  assert any(line.startswith('| h100 | usable |') for line in lines)


@pytest.mark.slow
def test_what_does_not_fit_is_followed_by_what_was_tried(
  make_counting, make_spec, console
):
  planner = make_counting('h100', memory=40 << 20)
  report.plan([planner], make_spec(), console)
  assert 'tried instead' in said(console)
  assert '--config.optim.moment_bits=8: ' in said(console)


def test_the_chosen_mesh_is_said(make_counting, make_spec, console):
  planner = make_counting('v5e-4')
  report.plan([planner], make_spec(), console, search=False)
  assert 'all 4 devices share rows and parameters' in said(console)
  assert 'largest microbatch' not in said(console)


def test_a_sweep_leaves_a_table_and_a_figure(
  make_counting, make_spec, console, tmp_path
):
  planners = [make_counting('gpu-12gb', memory=40 << 20)]
  report.plan_sweep(planners, make_spec(), console, tmp_path / 'new')
  (swept,) = json.loads((tmp_path / 'new' / 'sweep.json').read_text())
  peaks = [swept['peaks'][str(n)] for n in (256, 512, 1024)]
  assert peaks == sorted(peaks)
  assert swept['exact']
  assert (tmp_path / 'new' / 'sweep.png').read_bytes()[1:4] == b'PNG'
  assert '(counted)' in (tmp_path / 'new' / 'sweep.md').read_text()


@pytest.mark.slow
def test_a_sweep_ends_with_the_first_that_does_not_fit(
  make_counting, make_spec
):
  planner = make_counting('gpu-12gb', memory=40 << 20)
  sweep = sweep_lengths(planner, planner.prepare(make_spec()))
  *fitting, last = sweep.estimates.values()
  assert fitting
  assert all(estimate.fits for estimate in fitting)
  assert not last.fits
  lengths = list(sweep.estimates)
  assert lengths[-2] <= sweep.longest.size < lengths[-1]


def test_a_sweep_goes_no_further_than_the_base(make_counting, make_spec):
  planner = make_counting('h100')
  sweep = sweep_lengths(planner, planner.prepare(make_spec()))
  assert list(sweep.estimates) == [256, 512, 1024, 2048, 4096]
  assert sweep.longest is None


def test_answers_from_merged_weights_are_said(
  make_counting, make_spec, console
):
  planner, spec = make_counting('h100'), make_spec(eval__merge=True)
  report.plan([planner], spec, console, search=False)
  line = said(console).splitlines()[-1]
  assert line.startswith('  merged for answers     0.00 GiB beside what is')
  assert line.endswith('fits')
  estimate = planner.estimate(planner.prepare(spec))
  assert estimate.answers(80 << 30).endswith(' caches, does not fit')
