import jax
import jax.numpy as jnp
import pytest

from jlora.core import tree
from jlora.errors import ConfigError

PATHS = ['layers/mlp/kernel', 'layers/norm/scale', 'head/kernel']


def test_paths_name_dict_keys_and_list_positions():
  leaves = tree.leaves_by_path({'b': [1, 2], 'a': {'kernel': 3}})
  assert leaves == {'a/kernel': 3, 'b/0': 1, 'b/1': 2}


def test_nest_undoes_leaves_by_path():
  nested = {'a': {'kernel': 1, 'deep': {'bias': 2}}, 'b': 3}
  assert tree.nest(tree.leaves_by_path(nested)) == nested


def test_a_pattern_must_match_a_whole_path():
  assert tree.matching(['.*/kernel'], PATHS) == [PATHS[0], PATHS[2]]
  with pytest.raises(ConfigError, match='such as'):
    tree.matching(['kernel'], PATHS)


def test_matches_keep_the_order_of_the_paths():
  found = tree.matching(['head/.*', 'layers/mlp/.*', '.*/kernel'], PATHS)
  assert found == [PATHS[0], PATHS[2]]


def test_a_pattern_without_a_match_shows_the_closest_path():
  with pytest.raises(ConfigError, match=r"'hed/kernel'.*'head/kernel'"):
    tree.matching(['hed/kernel'], PATHS)


def test_a_broken_pattern_is_refused_by_name():
  with pytest.raises(ConfigError, match=r"'\(a' is no regular expression"):
    tree.matching(['(a'], PATHS)


def test_is_leaf_stops_the_descent():
  leaves = tree.leaves_by_path({'a': {'b': 1}}, lambda x: 'b' in x)
  assert jax.tree.leaves(leaves) == [1]
  assert list(leaves) == ['a']


def test_size_of_adds_all_arrays():
  arrays = {
    'a': jnp.zeros((3, 4), jnp.bfloat16),
    'b': [jnp.zeros(5, jnp.uint8)],
  }
  assert tree.size_of(arrays) == 2 * 12 + 5
