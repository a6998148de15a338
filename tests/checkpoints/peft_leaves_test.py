"""What of `trainable` can be written, and what PEFT's file holds of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jlora.checkpoints import adapters
from jlora.checkpoints.peft import load_adapter
from jlora.errors import AdapterError


def set_leaf(trainable, path, leaf):
  """Returns `trainable` with another node at one path; None takes it out."""
  *parents, name = path.split('/')
  copy = jax.tree.map(np.copy, trainable)
  node = copy
  for parent in parents:
    node = node.setdefault(parent, {})
  node[name] = leaf
  return {k: v for k, v in copy.items() if v != {name: None}}


KERNEL = {'a': np.ones((3, 16, 4)), 'b': np.ones((3, 4, 24))}
PAIR = {'a': np.ones((48, 4)), 'b': np.ones((4, 16))}

REFUSED_LEAVES = [
  ('head/kernel', KERNEL, "'head/kernel', which the spec does not train"),
  ('embed/embedding', PAIR, "'embed/embedding', which the spec does not"),
  ('final_norm/scale', None, "lacks 'final_norm/scale', which the spec trains"),
  ('layers/mlp/up_proj/kernel', {'a': KERNEL['a']}, 'base and spec need'),
  ('layers/mlp/gate_proj/kernel', PAIR, 'base and spec need'),
  ('final_norm/scale', {'full': np.ones(4)}, 'base and spec need'),
  ('final_norm/scale', {'full': np.full(16, np.nan)}, '16 of 16 values NaN'),
]


@pytest.mark.parametrize(('path', 'leaf', 'named'), REFUSED_LEAVES)
def test_a_leaf_that_does_not_fit_is_not_written(
  adapted, tmp_path, path, leaf, named
):
  trainable = set_leaf(adapted.trainable, path, leaf)
  broken = dataclasses.replace(adapted, trainable=trainable)
  with pytest.raises(AdapterError, match=named):
    broken.save(tmp_path / 'adapter')
  assert list(tmp_path.iterdir()) == []


def test_values_in_the_padding_are_not_written(make_adapted, tmp_path):
  adapted = make_adapted(rank_pattern={'layers/1/mlp/up_proj/kernel': 2})
  adapted.trainable['layers']['mlp']['up_proj']['kernel']['b'][1, 3, 0] = 1
  with pytest.raises(AdapterError, match='beyond rank 2 in layer 1'):
    adapted.save(tmp_path / 'adapter')


def shapes_in(folder):
  tensors = safetensors.numpy.load_file(folder / adapters.TENSORS_FILE)
  return {
    key.removeprefix('base_model.model.'): tensor.shape
    for key, tensor in tensors.items()
  }


def test_padding_and_unchosen_layers_are_not_in_the_file(
  make_adapted, tmp_path
):
  path = 'layers/{}/mlp/up_proj/kernel'
  adapted = make_adapted(
    targets=(path.format('[02]'),), rank_pattern={path.format(2): 2}
  )
  adapted.save(tmp_path / 'x')
  assert shapes_in(tmp_path / 'x') == {
    'model.layers.0.mlp.up_proj.lora_A.weight': (4, 16),
    'model.layers.0.mlp.up_proj.lora_B.weight': (24, 4),
    'model.layers.2.mlp.up_proj.lora_A.weight': (2, 16),
    'model.layers.2.mlp.up_proj.lora_B.weight': (24, 2),
  }
  found = load_adapter(tmp_path / 'x', adapted.config).trainable
  jax.tree.map(np.testing.assert_array_equal, found, adapted.trainable)


def test_an_embedding_lies_as_peft_has_it(make_adapted, tmp_path):
  adapted = make_adapted(False, targets=('embed/embedding',), variant='dora')
  adapted.save(tmp_path / 'x')
  assert shapes_in(tmp_path / 'x') == {
    'model.embed_tokens.lora_embedding_A': (4, 48),
    'model.embed_tokens.lora_embedding_B': (16, 4),
    'model.embed_tokens.lora_magnitude_vector': (16,),
  }


def test_the_rows_of_a_tied_head_are_stored_once(make_adapted, tmp_path):
  rows = {'embed/embedding': (3, 5)}
  adapted = make_adapted(targets=('.*/q_proj/kernel',), train_rows=rows)
  adapted.save(tmp_path / 'x')
  rows = {k: s for k, s in shapes_in(tmp_path / 'x').items() if 'token' in k}
  key = 'model.embed_tokens.token_adapter.trainable_tokens_delta'
  assert rows == {key: (2, 16)}
  config = json.loads((tmp_path / 'x' / adapters.CONFIG_FILE).read_bytes())
  assert config['trainable_token_indices'] == [3, 5]
