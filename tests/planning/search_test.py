"""Facts of jlora.planning.search."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.planning.search import (
  TRIES,
  largest,
  largest_rows,
  longest_rows,
  with_rows,
)


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_it_finds_the_largest_that_fits(most, start):
  found = largest(lambda size: size <= most, start, 60)
  assert found == (most, True)


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_it_asks_no_more_often_than_it_may(most, start):
  asked = []

  def fits(size):
    asked.append(size)
    return size <= most

  found = largest(fits, start)
  assert len(asked) <= TRIES
  assert found.size <= most
  assert found.exact == (found.size == most and most + 1 in asked)


@pytest.mark.parametrize('devices', [1, 4])
def test_the_largest_microbatch_is_between_fitting_and_not(
  make_counting, make_spec, devices
):
  planner = make_counting(f'gpu-12gb-{devices}', memory=300 << 20)
  spec = planner.prepare(make_spec(train__batch_size=devices))
  found = largest_rows(planner, spec)
  assert found.exact
  fits = [
    planner.count(with_rows(spec, rows * devices)).fits
    for rows in (found.size, found.size + 1)
  ]
  assert fits == [True, False]


def test_rows_are_no_longer_than_the_base_was_trained_for(
  make_counting, make_spec
):
  planner = make_counting('h100')
  spec = planner.prepare(make_spec(train__batch_size=1))
  assert longest_rows(planner, spec) == (4096, True)
