import dataclasses

import pytest

import jlora
from jlora.errors import ConfigError
from jlora.models import families, layout
from tests.decoders import CONFIG


def test_every_leaf_has_one_name_a_layer():
  for weight in layout.weights(CONFIG):
    assert len(weight.modules) == (3 if weight.stacked else 1)
    assert len(set(weight.modules)) == len(weight.modules)


def test_the_head_is_the_embedding_only_where_it_is_tied():
  untied = dataclasses.replace(CONFIG, tie_embeddings=False)
  assert layout.head_path(CONFIG) == 'embed/embedding'
  assert layout.head_path(untied) == 'lm_head/kernel'
  paths = {weight.path for weight in layout.weights(CONFIG)}
  assert 'lm_head/kernel' not in paths


def test_presets_become_patterns_over_this_family():
  spec = jlora.LoraSpec(targets=('attention', 'layers/mlp/up_proj/kernel'))
  found = families.resolve(spec, CONFIG)
  assert found.targets == (
    'layers/attention/([qkv]+|o)_proj/kernel',
    'layers/mlp/up_proj/kernel',
  )
  assert found.axes == families.AXES
  assert families.resolve(found, CONFIG) == found


def test_a_word_that_is_no_preset_is_refused():
  with pytest.raises(ConfigError, match="'attn' is no preset"):
    families.resolve(jlora.LoraSpec(targets='attn'), CONFIG)
  with pytest.raises(ConfigError, match='stands alone'):
    families.resolve(jlora.LoraSpec(targets=('all-linear', 'mlp')), CONFIG)
