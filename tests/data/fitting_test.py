import numpy as np
import pytest

from jlora.data.fitting import Fit, fit, require_kept
from jlora.data.tokens import Example
from jlora.errors import DataError


def fit_one(example, max_length, is_text=False, **options):
  return fit(example, is_text=is_text, max_length=max_length, **options)


@pytest.mark.parametrize(('n', 'is_text'), [(9, False), (3, True)])
def test_what_fits_is_left_alone(make_examples, n, is_text):
  (example,) = make_examples([n])
  (fitted,), counts = fit_one(example, 8, is_text)
  assert counts == Fit()
  np.testing.assert_array_equal(example.tokens, fitted.tokens)
  np.testing.assert_array_equal(example.loss_mask, fitted.loss_mask)


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
  (long,) = make_examples([10])
  assert fit_one(long, 4) == ([], Fit(dropped=1))


@pytest.mark.parametrize('n', [2, 8, 9, 10, 17, 18, 100])
def test_a_long_text_loses_no_target(n):
  tokens = np.arange(n, dtype=np.int32)
  pieces, counts = fit_one(Example(tokens, tokens > 0), 8, is_text=True)
  targets = np.concatenate([p.tokens[p.loss_mask] for p in pieces])
  np.testing.assert_array_equal(targets, tokens[1:])
  assert all(p.places <= 8 and not p.loss_mask[0] for p in pieces)
  assert counts == Fit(split=int(n > 9))


def test_what_is_too_long_can_be_dropped(make_examples):
  fits, long = make_examples([7, 8])
  assert len(fit_one(fits, 6, too_long='drop')[0]) == 1
  assert fit_one(long, 6, too_long='drop') == ([], Fit(dropped=1))


def test_text_is_split_where_conversations_are_dropped(make_examples):
  (example,) = make_examples([20])
  assert fit_one(example, 6, True, too_long='drop')[1] == Fit(split=1)
  assert fit_one(example, 6, True, too_long='error')[1] == Fit(split=1)


def test_one_that_is_too_long_can_be_an_error(make_examples):
  (example,) = make_examples([10])
  with pytest.raises(
    DataError, match=r'b\.csv:2: it takes 9 places, .*max_length=6'
  ):
    fit_one(example, 6, too_long='error', where='b.csv:2')


@pytest.mark.parametrize(
  ('counts', 'examples', 'max_lost', 'refused'),
  [
    (Fit(cut=1), 10, 0.1, False),
    (Fit(cut=2), 10, 0.1, True),
    (Fit(cut=1, dropped=1), 10, 0.1, True),
    (Fit(cut=3, dropped=6), 10, 1.0, False),
    (Fit(dropped=10), 10, 1.0, True),
    (Fit(split=10), 10, 0.1, False),
  ],
)
def test_more_than_may_be_lost_is_refused(counts, examples, max_lost, refused):
  def check():
    require_kept(counts, examples, max_lost=max_lost, max_length=6, longest=19)

  if not refused:
    return check()
  lost = counts.cut + counts.dropped
  with pytest.raises(
    DataError, match=rf'{lost} of 10 .*max_length=6.* longest takes 19'
  ):
    check()
