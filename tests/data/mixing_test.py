import numpy as np
import pytest

from jlora.data.mixing import Mixture, make_sources, shares
from jlora.errors import ConfigError, DataError


def drawn(mixture, epoch, seed=5):
  """Which examples of each source an epoch holds."""
  indices = mixture.draw(seed, epoch)
  borders = np.cumsum(mixture.sizes)[:-1]
  return np.split(indices, np.searchsorted(indices, borders))


def test_an_epoch_keeps_to_the_weights_and_repeats_nothing():
  mixture = Mixture((300, 100), (1.0, 1.0))
  assert mixture.counts == (100, 100)
  assert Mixture((300, 100), (3, 1)).counts == (300, 100)
  assert Mixture((300, 1000), (0.9, 0.1)).counts == (300, 33)
  assert Mixture((100, 300), (0.1, 0.9)).counts == (33, 300)
  assert Mixture((30, 270), (0.1, 0.9)).counts == (30, 270)
  a, b = drawn(mixture, 0)
  assert len(set(a.tolist())) == len(a) == 100
  assert b.tolist() == list(range(300, 400))


def test_epochs_go_round_a_large_source():
  mixture = Mixture((250, 100), (1, 1))
  epochs = [drawn(mixture, epoch)[0] for epoch in range(5)]
  first, second, third, *_ = map(set, (e.tolist() for e in epochs))
  assert not first & second
  assert len(first | second | third) == 250
  # Two rounds in five epochs: each example comes twice.
  assert (np.bincount(np.concatenate(epochs)) == 2).all()


def test_a_draw_depends_on_seed_and_epoch_only():
  a, b = Mixture((50, 9), (1, 1)), Mixture((50, 9), (1, 1))
  assert (a.draw(1, 3) == b.draw(1, 3)).all()
  assert (a.draw(1, 3) != a.draw(2, 3)).any()


def test_without_weights_all_is_taken():
  mixture = Mixture((3, 2), (None, None))
  assert mixture.draw(0, 7).tolist() == [0, 1, 2, 3, 4]


def test_a_source_that_an_epoch_leaves_out_is_refused():
  mixture = Mixture((10, 10), (100, 1))
  with pytest.raises(DataError, match=r"none of the 10 examples of 'b'"):
    mixture.require_all(['a', 'b'])


@pytest.mark.parametrize(
  'value', [{'a': 3, 'b': 1}, [['a', 3], ['b', 1]], (('a', 3), ('b', 1))]
)
def test_sources_are_pairs_however_they_are_given(value):
  sources = make_sources(value)
  assert sources == (('a', 3), ('b', 1))
  assert shares(sources) == [0.75, 0.25]


def test_sources_without_weights_count_alike():
  assert make_sources('a') == 'a'
  assert make_sources(['a', 'b']) == (('a', None), ('b', None))
  assert shares((('a', None), ('b', None))) == [0.5, 0.5]


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ({'a': 0}, 'weight 0; each is a number above 0'),
    ({'a': 'much'}, "weight 'much'"),
    ({'a': float('inf')}, 'weight inf'),
    ([['a', 1], 'b'], 'weight None'),
    (['a', 'a'], r"twice: \['a', 'a'\]"),
    ([3], r'data.train is \[3\]; it takes'),
    ([''], 'it takes a source'),
    ((), 'it takes a source'),
  ],
)
def test_wrong_sources_are_refused(value, message):
  with pytest.raises(ConfigError, match=message):
    make_sources(value)
