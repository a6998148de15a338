import math

import numpy as np
import pytest

from jlora.errors import DataError
from jlora.inference.scorer import Result, evaluate_loss, score_generations


def score(completion, conversation):
  return 1.0 if completion == conversation else 0.99


def is_well_formed(completion, conversation):
  del conversation
  return completion.isdigit()


def test_shares_count_right_and_well_formed_completions():
  completions = ['4', 'four', '5', '6']
  scores = score_generations(
    completions, ['4', 'four', '7', '8'], score, is_well_formed
  )
  assert scores.n == 4
  assert scores.exact_match == 0.5
  assert scores.well_formed == 0.75
  assert scores.results[1] == Result('four', 1.0, False)
  assert scores.results[2] == Result('5', 0.99, True)


@pytest.mark.parametrize(('answers', 'asked'), [(0, 0), (1, 2), (2, 1)])
def test_a_completion_for_each_conversation_is_needed(answers, asked):
  with pytest.raises(DataError, match=f'{answers} completions .* {asked} conv'):
    score_generations(['x'] * answers, ['x'] * asked, score, is_well_formed)


def test_every_trained_token_counts_the_same():
  batches = [(6.0, 3), (0.0, 0), (10.0, 1)]
  result = evaluate_loss(lambda batch: batch, batches)
  assert (result.loss, result.tokens, result.valid) == (4.0, 4, True)
  assert result.perplexity == math.exp(4.0)


def test_sums_are_made_in_float64():
  # In float32, 2^24 + 1 is 2^24.
  batches = [(np.float32(2**24), 1), *[(np.float32(1), 0)] * 64]
  assert evaluate_loss(lambda batch: batch, batches).loss == 2**24 + 64


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_invalid(bad):
  result = evaluate_loss(lambda batch: batch, [(1.0, 1), (bad, 1)])
  assert not result.valid
  assert result.tokens == 2


def test_no_trained_token_is_invalid():
  result = evaluate_loss(lambda batch: batch, [(0.0, 0)])
  assert not result.valid
  assert math.isnan(result.loss)


def test_a_perplexity_beyond_floats_is_infinite():
  result = evaluate_loss(lambda batch: batch, [(1e4, 1)])
  assert result.perplexity == math.inf
  assert result.valid
