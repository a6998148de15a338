"""A spec and what PEFT's names say of it, there and back."""

import jax
import numpy as np
import pytest

from jlora.checkpoints.peft_modules import make_modules
from jlora.checkpoints.peft_selection import (
  Selection,
  check_selection,
  layer_names,
  select,
  spec_of,
)
from jlora.core import lora, targets
from jlora.core.lora import LoraSpec
from jlora.errors import AdapterError
from jlora.models import families, layout

Q, UP = 'layers/attention/q_proj/kernel', 'layers/mlp/up_proj/kernel'


@pytest.fixture(scope='module')
def config(make_adapted):
  return make_adapted(tied=False).config


@pytest.fixture(scope='module')
def tied_config(make_adapted):
  return make_adapted(tied=True).config


def make_spec(**fields):
  return LoraSpec(**{'rank': 4, 'axes': families.AXES, **fields})


def strengths(spec, config):
  """Returns ranks and scales of every kernel as lists."""
  leaves = {
    w.path: jax.ShapeDtypeStruct(w.shape, np.float32)
    for w in layout.weights(config)
  }
  adapted = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  return {
    path: (x.ranks.tolist(), x.scales.tolist())
    for path, x in lora.strengths(adapted, spec).items()
  }


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'scaling': 'rslora', 'alpha': 3.3},
    {'targets': ('layers/[02]/mlp/.*',), 'variant': 'dora'},
    {'exclude': ('layers/1/.*', UP)},
    {'rank_pattern': {'layers/0/.*': 8, '.*/q_proj/.*': 2}},
    {'alpha_pattern': {'layers/2/.*/q_proj/.*': 0.1, '.*/q_proj/.*': 7}},
    {
      'targets': (Q, 'layers/1/mlp/up_proj/kernel', 'embed/.*', 'lm_head/.*'),
      'rank_pattern': {'embed/embedding': 1, 'layers/2/.*': 3},
      'alpha_pattern': {'lm_head/kernel': 5},
    },
  ],
)
def test_ranks_and_scales_come_back_exactly(config, fields):
  spec = make_spec(**fields)
  again = spec_of(select(spec, config), config)
  assert strengths(again, config) == strengths(spec, config)
  assert again.variant == spec.variant
  assert select(again, config) == select(spec, config)


def test_twice_the_rank_has_the_same_scales(config):
  for scaling in lora.SCALINGS:
    spec = make_spec(scaling=scaling, rank_pattern={'layers/1/.*': 2})
    doubled = spec_of(select(spec, config).doubled(), config)
    pairs = zip(
      strengths(spec, config).values(),
      strengths(doubled, config).values(),
      strict=True,
    )
    for (ranks, scales), (twice, same) in pairs:
      assert twice == [2 * rank for rank in ranks]
      np.testing.assert_allclose(same, scales, rtol=2**-23)  # 1 ulp


def test_whole_leaves_and_rows_come_back(config):
  spec = make_spec(
    targets=(Q,),
    train_full=('.*norm/scale',),
    train_rows={'embed/embedding': (1, 7), 'lm_head/kernel': (2,)},
    dropout=0.1,
  )
  again = spec_of(select(spec, config), config)
  assert again.targets == (Q,)
  assert set(again.train_full) == {
    'layers/attention_norm/scale',
    'layers/mlp_norm/scale',
    'final_norm/scale',
  }
  assert again.train_rows == spec.train_rows
  assert again.dropout == 0.1


def test_patterns_name_leaves_where_all_layers_agree(config):
  spec = make_spec(
    targets=(Q, UP), rank_pattern={UP: 2, 'layers/1/.*/q_proj/.*': 3}
  )
  again = spec_of(select(spec, config), config)
  assert again.targets == (Q, UP)
  assert again.rank == 2
  assert again.rank_pattern == (
    ('layers/0/attention/q_proj/kernel', 4),
    ('layers/1/attention/q_proj/kernel', 3),
    ('layers/2/attention/q_proj/kernel', 4),
  )


def test_layers_are_named_in_the_order_of_the_modules(config):
  (weight,) = [w for w in layout.weights(config) if w.path == UP]
  assert [name.split('/')[1] for name in layer_names(weight)] == list('012')
  assert [m.split('.')[2] for m in weight.modules] == list('012')


REFUSED = [
  ({'targets': ('final_norm/.*', UP)}, 'is no kernel'),
  ({'targets': 'layers/mlp_norm/.*', 'rank': 2}, 'neither a linear layer'),
  ({'targets': (Q,), 'train_rows': {UP: (1,)}}, 'no rows to train'),
  ({'targets': (Q,), 'train_rows': {'embed/.*': (48,)}}, 'row 48 of .*48'),
  ({'targets': (Q,), 'train_full': (Q,)}, 'by targets and by train_full'),
]


@pytest.mark.parametrize(('fields', 'named'), REFUSED)
def test_what_peft_has_no_form_for_is_refused(config, fields, named):
  with pytest.raises(ValueError, match=named):
    select(make_spec(**fields), config)


def test_dora_of_a_tied_embedding_is_refused(tied_config):
  spec = make_spec(targets=('embed/embedding',), variant='dora')
  with pytest.raises(AdapterError, match='over the vocabulary'):
    select(spec, tied_config)


def test_a_tied_head_with_another_rank_is_refused(tied_config):
  selection = Selection(
    pairs={'model.embed_tokens': (4, 8.0), 'lm_head': (2, 8.0)},
    saved=frozenset(),
    rows={},
    dropout=0.0,
    scaling='lora',
    variant='lora',
  )
  with pytest.raises(AdapterError, match=r'\(2, 8.0\), \(4, 8.0\)'):
    check_selection(selection, make_modules(tied_config))
