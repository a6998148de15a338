import jax.numpy as jnp
import pytest

from jlora.core import targets
from jlora.errors import ConfigError

LEAVES = {
  'embed/embedding': jnp.zeros((8, 4)),
  'layers/up/kernel': jnp.zeros((2, 4, 6)),
  'layers/up/bias': jnp.zeros((2, 6)),
  'layers/norm/kernel': jnp.zeros((4,)),
  'head/kernel': jnp.zeros((4, 8)),
}
AXES = (('layers/.*', 'layers | in -> out'), ('head/.*', 'embed -> vocab'))


def test_all_linear_takes_kernels_but_no_head_and_no_vector():
  found = targets.select(LEAVES, 'all-linear', (), AXES)
  assert list(found) == ['layers/up/kernel']
  assert found['layers/up/kernel'].roles.stacked == ('layers',)


def test_a_pattern_may_name_the_head():
  assert list(targets.select(LEAVES, ('head/kernel',), (), AXES)) == [
    'head/kernel'
  ]


def test_exclude_takes_leaves_out_again():
  patterns = ('layers/up/kernel', 'head/kernel')
  found = targets.select(LEAVES, patterns, ('head/.*',), AXES)
  assert list(found) == ['layers/up/kernel']


def test_an_exclusion_that_matches_nothing_is_refused():
  with pytest.raises(ConfigError, match="'hed/kernel' matches none"):
    targets.select(LEAVES, 'all-linear', ('hed/kernel',), AXES)


@pytest.mark.parametrize('word', ['attention', 'mlp', 'all-linear'])
def test_an_unresolved_preset_is_named(word):
  with pytest.raises(ConfigError, match=f"'{word}' is a preset"):
    targets.select(LEAVES, (word,), (), AXES)


def test_a_leaf_at_the_root_is_no_preset():
  leaves = {'kernel': jnp.zeros((3, 4))}
  assert list(targets.select(leaves, ('kernel',), (), ())) == ['kernel']


def test_all_linear_without_kernels_says_what_to_do():
  with pytest.raises(ConfigError, match='none is named kernel'):
    targets.select({'w': jnp.zeros((2, 2))}, 'all-linear', (), ())


def test_axes_come_as_a_mapping_or_as_pairs():
  pairs = [['a', 'in -> out'], ['b', 'l | in -> out']]
  assert targets.as_axes(dict(pairs)) == targets.as_axes(pairs)
  with pytest.raises(ConfigError, match='must read'):
    targets.as_axes({'a': 'in out'})


def test_patterns_must_be_text():
  with pytest.raises(ConfigError, match='targets holds 3'):
    targets.as_patterns(['a', 3], 'targets')
  with pytest.raises(ConfigError, match='exclude is None'):
    targets.as_patterns(None, 'exclude')
