import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.data.packing import make_batch, pack_rows
from jlora.data.tokens import Example
from jlora.errors import DataError


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 32), max_size=80))
def test_every_example_is_in_one_row_that_holds_it(lengths):
  rows = pack_rows(lengths, 32)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  assert all(sum(lengths[i] for i in row) <= 32 for row in rows)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=80))
def test_rows_are_at_least_half_full_on_average(lengths):
  # No two rows would fit into one, so n rows hold more than (n // 2) * 32.
  assert len(pack_rows(lengths, 32)) <= 2 * -(-sum(lengths) // 32)


def test_the_tightest_row_is_filled_first():
  assert pack_rows([3, 6, 5, 4, 2], 10) == [[1, 3], [2, 0, 4]]


def test_an_example_longer_than_a_row_is_refused():
  with pytest.raises(
    DataError, match='11 tokens does not fit into a row of 10'
  ):
    pack_rows([3, 11], 10)


def test_a_row_is_laid_out_segment_by_segment():
  first = Example(np.array([5, 6, 7], np.int32), np.array([False, False, True]))
  second = Example(
    np.array([8, 9, 3, 4], np.int32), np.array([False, True, True, False])
  )
  batch = make_batch([[first, second]], batch_size=2, max_length=6)
  wanted = {
    'tokens': [5, 6, 8, 9, 0, 0],
    'targets': [6, 7, 9, 3, 0, 0],
    'loss_mask': [0, 1, 1, 1, 0, 0],
    'segment_ids': [1, 1, 2, 2, 0, 0],
    'positions': [0, 1, 0, 1, 0, 0],
  }
  for field, row in wanted.items():
    array = getattr(batch, field)
    np.testing.assert_array_equal(array, [row, [0] * 6], err_msg=field)
    kind = np.float32 if field == 'loss_mask' else np.int32
    assert array.dtype == kind


def test_every_learned_token_is_a_target_once(make_examples):
  examples = make_examples([9, 4, 7, 2, 5])
  rows = pack_rows([e.places for e in examples], 12)
  batch = make_batch(
    [[examples[i] for i in row] for row in rows], batch_size=4, max_length=12
  )
  targets = batch.targets[batch.loss_mask == 1]
  learned = np.concatenate([e.tokens[e.loss_mask] for e in examples])
  np.testing.assert_array_equal(np.sort(targets), np.sort(learned))
