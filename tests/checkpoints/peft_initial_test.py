"""Adapters whose init changed the base, as plain LoRA of twice the rank."""

import jax
import numpy as np
import pytest

from jlora.checkpoints.peft import load_adapter, split_initial
from jlora.core import tree
from jlora.errors import AdapterError

FIELDS = {
  'init': 'pissa',
  'rank_pattern': {'layers/1/.*': 2, 'layers/mlp/up_proj/kernel': 3},
  'exclude': ('layers/0/mlp/down_proj/kernel',),
}


@pytest.fixture
def changed(make_adapted):
  return make_adapted(**FIELDS, train_full=('final_norm/scale',))


@pytest.fixture
def initial(make_adapted):
  return make_adapted(
    **FIELDS, train_full=('final_norm/scale',), seed=1
  ).trainable


def test_the_update_is_what_training_added(changed, initial, tmp_path):
  changed.save(tmp_path / 'x', initial=initial)
  adapter = load_adapter(tmp_path / 'x', changed.config)
  assert adapter.spec.init == 'lora'

  def product(trainable):
    node = trainable['layers']['mlp']['up_proj']['kernel']
    return node['a'] @ node['b']

  found = product(adapter.trainable)
  expected = product(changed.trainable) - product(initial)
  # float32 sums of at most 8 products of values below 1.
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_two_halves_come_back(changed, initial, tmp_path):
  changed.save(tmp_path / 'x', initial=initial, step=3)
  adapter = load_adapter(tmp_path / 'x', changed.config)
  trained, started, spec = split_initial(adapter, changed.config)
  assert spec == changed.spec
  jax.tree.map(np.testing.assert_array_equal, trained, changed.trainable)
  pairs = {
    path: leaf
    for path, leaf in tree.leaves_by_path(initial).items()
    if not path.endswith('full')
  }
  jax.tree.map(np.testing.assert_array_equal, started, tree.nest(pairs))


def test_a_loaded_adapter_can_be_written_again(changed, initial, tmp_path):
  changed.save(tmp_path / 'x', initial=initial)
  changed.expect_same_bytes_again(tmp_path / 'x')


def test_without_the_initial_adapters_it_is_refused(changed, tmp_path):
  with pytest.raises(AdapterError, match=r"'pissa' took .* pass initial="):
    changed.save(tmp_path / 'x')
  assert list(tmp_path.iterdir()) == []


def test_initial_adapters_of_another_shape_are_refused(
  changed, initial, tmp_path
):
  initial['layers']['mlp']['up_proj']['kernel']['a'] = np.ones((3, 16, 4))
  with pytest.raises(AdapterError, match=r'\(3, 16, 4\).* base and spec need'):
    changed.save(tmp_path / 'x', initial=initial)


def test_an_adapter_that_left_the_base_alone_has_no_halves(
  adapted, adapter_folder
):
  adapter = load_adapter(adapter_folder, adapted.config)
  with pytest.raises(AdapterError, match='only one with an init'):
    split_initial(adapter, adapted.config)
