import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core import lora, targets
from jlora.errors import ConfigError

LEAVES = {
  'layers/up/kernel': jnp.zeros((3, 8, 6)),
  'layers/down/kernel': jnp.zeros((3, 6, 8)),
  'head/kernel': jnp.zeros((8, 12)),
}
AXES = {'layers/.*': 'layers | in -> out'}


def strengths(**fields):
  spec = jlora.LoraSpec(**({'rank': 4, 'alpha': 8.0, 'axes': AXES} | fields))
  found = targets.select(LEAVES, spec.targets, spec.exclude, spec.axes)
  return lora.strengths(found, spec)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rank': 0}, 'lora.rank is 0'),
    ({'rank': -4}, 'lora.rank is -4'),
    ({'rank': 1.5}, 'lora.rank is 1.5'),
    ({'rank': float('nan')}, 'lora.rank is nan'),
    ({'rank': float('inf')}, 'lora.rank is inf'),
    ({'alpha': 0.0}, 'lora.alpha is 0'),
    ({'alpha': -1.0}, 'lora.alpha is -1'),
    ({'alpha': float('nan')}, 'lora.alpha is nan'),
    ({'alpha': float('inf')}, 'lora.alpha is inf'),
    ({'dropout': 1.0}, 'lora.dropout is 1'),
    ({'dropout': -0.1}, 'lora.dropout is -0.1'),
    ({'dropout': float('nan')}, 'lora.dropout is nan'),
    ({'rank': True}, 'lora.rank is True'),
    ({'scaling': 'rs'}, "scaling 'rs' is none of 'lora', 'rslora'"),
    ({'variant': 'x'}, "variant 'x' is none of 'lora', 'dora'"),
    ({'init': 'svd'}, "init 'svd' is none of 'lora', 'gaussian', 'pissa'"),
    ({'rank_pattern': {'a': 0}}, "lora.rank_pattern for 'a' is 0"),
    ({'rank_pattern': 3}, 'lora.rank_pattern is 3; it takes pairs'),
    ({'alpha_pattern': {'a': -2}}, "lora.alpha_pattern for 'a' is -2"),
    ({'train_rows': {'a': []}}, 'it takes row ids'),
    ({'train_rows': {'a': [-1]}}, 'it takes row ids'),
    ({'train_rows': {'a': ['b']}}, r"has \['b'\] for 'a'"),
    ({'train_rows': {'a': [float('inf')]}}, r'has \[inf\]'),
    ({'train_rows': {'a': [None]}}, r'has \[None\]'),
    ({'train_rows': {'a': 'bc'}}, "has 'bc'"),
    ({'train_rows': {'a': [3, 1]}}, 'must be sorted, each id once'),
    ({'targets': (3,)}, 'targets holds 3'),
    ({'axes': {'a': 'b'}}, "axis roles 'b'"),
  ],
)
def test_a_spec_refuses_what_cannot_be(fields, message):
  with pytest.raises(ConfigError, match=message):
    jlora.LoraSpec(**fields)


def test_a_whole_rank_may_come_as_a_float():
  rank = jlora.LoraSpec(rank=4.0).rank
  assert (rank, type(rank)) == (4, int)


def test_the_scale_is_alpha_over_rank_or_over_its_root():
  assert jlora.LoraSpec(rank=16, alpha=12.0).scale == 0.75
  assert jlora.LoraSpec(rank=16, alpha=12.0, scaling='rslora').scale == 3


def test_specs_with_lists_are_hashable_and_equal():
  one = jlora.LoraSpec(targets=['a'], train_full='b', axes={'a': 'x -> y'})
  two = jlora.LoraSpec(targets='a', train_full=('b',), axes=(('a', 'x -> y'),))
  assert hash(one) == hash(two)
  assert one == two


def test_rows_come_as_a_mapping_of_lists():
  spec = jlora.LoraSpec(train_rows={'embed/.*': [3, 7]})
  assert spec.train_rows == (('embed/.*', (3, 7)),)
  assert hash(spec)


def test_a_kernel_that_no_pattern_names_has_the_rank_of_the_spec():
  found = strengths()
  assert {path: s.rank for path, s in found.items()} == dict.fromkeys(LEAVES, 4)
  np.testing.assert_array_equal(found['layers/up/kernel'].scales, [2, 2, 2])
  assert found['head/kernel'].scales.shape == ()


def test_the_first_pattern_that_matches_gives_rank_and_alpha():
  found = strengths(
    rank_pattern={'layers/1/up/kernel': 2, 'layers/.*': 3},
    alpha_pattern={'.*/down/.*': 6},
  )
  up, down = found['layers/up/kernel'], found['layers/down/kernel']
  np.testing.assert_array_equal(up.ranks, [3, 2, 3])
  np.testing.assert_allclose(up.scales, [8 / 3, 4, 8 / 3], rtol=1e-6)
  np.testing.assert_array_equal(down.scales, [2, 2, 2])
  assert found['head/kernel'].rank == 4


def test_rslora_divides_by_the_root_of_each_rank():
  found = strengths(scaling='rslora', rank_pattern={'layers/2/up/kernel': 1})
  np.testing.assert_array_equal(found['layers/up/kernel'].scales, [4, 4, 8])


def test_a_layer_that_is_not_chosen_has_rank_and_scale_zero():
  found = strengths(targets='layers/[02]/up/kernel')
  np.testing.assert_array_equal(found['layers/up/kernel'].ranks, [4, 0, 4])
  np.testing.assert_array_equal(found['layers/up/kernel'].scales, [2, 0, 2])
  assert list(found) == ['layers/up/kernel']


def test_a_layer_can_be_excluded():
  found = strengths(exclude=('layers/1/.*', 'head/.*'))
  np.testing.assert_array_equal(found['layers/down/kernel'].ranks, [4, 0, 4])
  assert 'head/kernel' not in found


@pytest.mark.parametrize('field', ['rank_pattern', 'alpha_pattern'])
def test_a_pattern_that_names_no_adapted_kernel_is_refused(field):
  with pytest.raises(ConfigError, match=r"'layers/9/\.\*' matches none"):
    strengths(**{field: {'layers/9/.*': 2}})
