import numpy as np
import pytest

from jlora.data.fitting import Fit, fit
from jlora.data.tokens import Example
from jlora.errors import DataError


def fit_one(example, max_length, is_text=False, **options):
  options = {'max_lost': 1.0} | options
  return fit([example], [is_text], max_length=max_length, **options)


def test_what_fits_is_left_alone(make_examples):
  examples = make_examples([9, 3])
  fitted, counts = fit(examples, [False, True], max_length=8)
  assert counts == Fit()
  for before, after in zip(examples, fitted, strict=True):
    np.testing.assert_array_equal(before.tokens, after.tokens)
    np.testing.assert_array_equal(before.loss_mask, after.loss_mask)


def test_a_long_conversation_loses_its_end(make_examples):
  (example,) = make_examples([10])
  (cut,), counts = fit_one(example, 6)
  np.testing.assert_array_equal(cut.tokens, example.tokens[:7])
  np.testing.assert_array_equal(cut.loss_mask, example.loss_mask[:7])
  assert counts == Fit(cut=1)


def test_losing_what_is_not_learned_is_no_loss():
  mask = np.array([0, 0, 1, 1, 0, 0, 0], bool)
  example = Example(np.arange(7, dtype=np.int32), mask)
  assert fit_one(example, 3)[1] == Fit()
  assert fit_one(example, 2)[1] == Fit(cut=1)


def test_a_conversation_without_an_answer_left_is_dropped(make_examples):
  short, long = make_examples([4, 10])
  fitted, counts = fit(
    [short, long], [False, False], max_length=4, max_lost=1.0
  )
  assert len(fitted) == 1
  assert counts == Fit(dropped=1)


@pytest.mark.parametrize('n', [2, 8, 9, 10, 17, 18, 100])
def test_a_long_text_loses_no_target(n):
  tokens = np.arange(n, dtype=np.int32)
  pieces, counts = fit_one(Example(tokens, tokens > 0), 8, is_text=True)
  targets = np.concatenate([p.tokens[p.loss_mask] for p in pieces])
  np.testing.assert_array_equal(targets, tokens[1:])
  assert all(p.places <= 8 and not p.loss_mask[0] for p in pieces)
  assert counts == Fit(split=int(n > 9))


@pytest.mark.parametrize(('long', 'refused'), [(1, False), (2, True)])
def test_more_than_a_tenth_lost_is_refused(make_examples, long, refused):
  examples = make_examples([4] * (10 - long) + [8] * long)
  if refused:
    with pytest.raises(DataError, match=r'2 of 10.*max_length=6 \(2 cut, 0'):
      fit(examples, [False] * 10, max_length=6)
  else:
    assert fit(examples, [False] * 10, max_length=6)[1] == Fit(cut=1)


def test_what_is_too_long_can_be_dropped_however_much_it_is(make_examples):
  examples = make_examples([4, 10, 7, 8])
  fitted, counts = fit(examples, [False] * 4, max_length=6, too_long='drop')
  assert [len(example) for example in fitted] == [4, 7]
  assert counts == Fit(dropped=2)


def test_text_is_split_where_conversations_are_dropped(make_examples):
  (example,) = make_examples([20])
  assert fit_one(example, 6, True, too_long='drop')[1] == Fit(split=1)
  assert fit_one(example, 6, True, too_long='error')[1] == Fit(split=1)


def test_one_that_is_too_long_can_be_an_error(make_examples):
  examples = make_examples([4, 10])
  with pytest.raises(
    DataError, match=r'b\.csv:2: it takes 9 places, .*max_length=6'
  ):
    fit(
      examples,
      [False, False],
      max_length=6,
      too_long='error',
      where=['a.csv:1', 'b.csv:2'],
    )


def test_nothing_left_is_refused(make_examples):
  with pytest.raises(DataError, match=r'1 of 1 examples.*longest takes 19'):
    fit_one(make_examples([20])[0], 5)
