import jax
import jax.numpy as jnp
import pytest

import jlora

AXES = {'layers/.*': 'layers | in -> out'}
SHAPES = {
  'embed': {'embedding': (32, 64)},
  'layers': {
    'up': {'kernel': (3, 64, 8), 'bias': (3, 8)},
    'down': {'kernel': (3, 64, 8)},
  },
  'norm': {'scale': (64,)},
}


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def describe(params, quant=None, **fields):
  spec = jlora.LoraSpec(**({'rank': 4, 'axes': AXES} | fields))
  return jlora.describe(params, spec, quant=quant)


def test_leaves_that_are_alike_share_a_row(params):
  found = describe(params, train_full='.*(bias|scale)')
  first, *whole = found.rows
  assert first.paths == ('layers/down/kernel', 'layers/up/kernel')
  assert (first.pattern, first.how) == ('all-linear', 'rank 4')
  assert first.roles == 'layers | in -> out'
  assert [row.paths for row in whole] == [('layers/up/bias',), ('norm/scale',)]


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'variant': 'dora'},
    {'targets': ('.*/kernel', 'embed/embedding')},
    {'train_full': 'norm/scale', 'train_rows': {'embed/.*': [1, 5]}},
  ],
)
def test_the_count_is_that_of_partition(params, fields):
  spec = jlora.LoraSpec(rank=4, axes=AXES, **fields)
  _, trainable = jlora.partition(jax.random.key(0), params, spec)
  total = sum(leaf.size for leaf in jax.tree.leaves(trainable))
  assert describe(params, **fields).parameters == total


def test_zero_padding_is_not_counted(params):
  found = describe(
    params, targets='layers/[01]/up/kernel', rank_pattern={'layers/0/.*': 2}
  )
  (row,) = found.rows
  assert (row.how, row.parameters) == ('rank 0-4', (2 + 4 + 0) * (64 + 8))


def test_what_stays_frozen_is_told_in_bytes(params):
  quant = jlora.QuantSpec(axes=AXES, double_quant=False)
  found = describe(params, quant, train_full='norm/scale')
  kernel = 3 * (64 * 8 // 2 + 8 * 4)
  assert found.quantized == {
    'layers/down/kernel': kernel,
    'layers/up/kernel': kernel,
  }
  assert found.dense == {'embed/embedding': 4096, 'layers/up/bias': 48}


@pytest.mark.parametrize(
  ('fields', 'meant'),
  [
    ({'targets': 'up'}, "'.*up/kernel'"),
    ({'targets': 'params/layers/up/kernel'}, "'layers/up/kernel'"),
    ({'targets': ('layers/up/kernel', 'layers/op/kernel')}, "'layers/up/ker"),
    ({'train_full': 'norm'}, "'.*norm/scale'"),
    ({'train_rows': {'embed': [1]}}, "'.*embed/embedding'"),
    ({'targets': '*kernel'}, 'is no regular expression'),
    ({'targets': 'norm/scale'}, 'is no kernel'),
  ],
)
def test_a_pattern_of_no_use_is_a_problem_that_shows_what_was_meant(
  params, fields, meant
):
  found = describe(params, **fields)
  assert any(meant in problem for problem in found.problems)
  assert f'! {found.problems[0]}' in str(found)


def test_the_table_reads_from_the_patterns_to_what_is_frozen(params):
  text = str(describe(params, jlora.QuantSpec(axes=AXES)))
  lines = text.splitlines()
  assert lines[0] == "targets 'all-linear'"
  row = '1,728 parameters rank 4 3 × 64 × 8 layers | in -> out'
  assert lines[1].split() == f'{row} layers/down/kernel and 1 more'.split()
  assert lines[2] == 'trained in float32: 1,728 parameters, 6.9 kB'
  assert lines[3].startswith('frozen, quantized: 2 leaves')
