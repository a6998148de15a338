import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jlora.errors import ConfigError
from jlora.inference.sampling import Sampling, choose

LOGITS = np.array([0.5, 2.0, -1.0, 1.0, 0.0, 1.5], np.float32)
DRAWS = 4096


def draw(sampling, logits=LOGITS):
  keys = jax.random.split(jax.random.key(0), DRAWS)
  rows = jnp.broadcast_to(logits, (DRAWS, len(logits)))
  return np.bincount(choose(rows, keys, sampling), minlength=len(logits))


def softmax(logits):
  shares = np.exp(logits - logits.max())
  return shares / shares.sum()


def assert_drawn_from(counts, shares):
  """Pearson's test: a right sampler fails it with probability 1e-4."""
  possible = shares > 0
  assert not counts[~possible].any()
  expected = DRAWS * shares[possible]
  statistic = ((counts[possible] - expected) ** 2 / expected).sum()
  assert statistic < stats.chi2.ppf(1 - 1e-4, possible.sum() - 1)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
  counts = draw(Sampling(temperature=temperature))
  assert_drawn_from(counts, softmax(LOGITS / temperature))


def test_top_k_samples_from_the_k_likeliest():
  counts = draw(Sampling(temperature=1.0, top_k=3))
  kept = np.where(np.isin(np.arange(6), [1, 5, 3]), LOGITS, -np.inf)
  assert_drawn_from(counts, softmax(kept))


def test_top_p_samples_from_the_fewest_that_reach_it():
  shares = softmax(LOGITS)
  two = shares[1] + shares[5]
  for top_p, kept in ((two - 1e-3, [1, 5]), (two + 1e-3, [1, 5, 3])):
    counts = draw(Sampling(temperature=1.0, top_p=top_p))
    some = np.where(np.isin(np.arange(6), kept), LOGITS, -np.inf)
    assert_drawn_from(counts, softmax(some))


def test_top_p_counts_among_the_top_k():
  # Of the three likeliest, the first two hold 0.82; of all six, only 0.65.
  sampling = Sampling(temperature=1.0, top_k=3, top_p=0.8)
  assert np.flatnonzero(draw(sampling)).tolist() == [1, 5]


def test_top_p_of_one_leaves_nothing_out():
  assert_drawn_from(draw(Sampling(temperature=1.0, top_p=1.0)), softmax(LOGITS))


def test_a_tiny_top_p_is_greedy():
  assert draw(Sampling(temperature=1.0, top_p=1e-6))[1] == DRAWS


def test_a_top_k_of_one_is_greedy_even_in_a_tie():
  logits = np.array([0.0, 3.0, 3.0], np.float32)
  assert draw(Sampling(), logits)[1] == DRAWS
  assert draw(Sampling(temperature=5.0, top_k=1), logits)[1] == DRAWS


def test_a_top_k_above_the_vocabulary_keeps_all():
  counts = draw(Sampling(temperature=1.0, top_k=1000))
  assert_drawn_from(counts, softmax(LOGITS))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('temperature', -1.0),
    ('temperature', 1e-6),
    ('temperature', math.inf),
    ('temperature', math.nan),
    ('top_k', 0),
    ('top_p', 0.0),
    ('top_p', 1.5),
    ('max_new_tokens', 0),
  ],
)
def test_an_impossible_value_is_refused(field, value):
  with pytest.raises(ConfigError, match=f'{field} is {value}'):
    Sampling(**{field: value})
