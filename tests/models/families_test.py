import dataclasses
import math

import pytest

import jlora
from jlora.core import tree
from jlora.errors import ConfigError
from jlora.models import families, layout
from tests.decoders import CONFIG


def test_every_leaf_has_one_name_at_each_of_its_places(family_config):
  names = []
  for weight in layout.weights(family_config):
    assert weight.shape[: len(weight.stack)] == weight.stack
    assert len(weight.tensors) == math.prod(weight.stack)
    names += weight.tensors
  assert len(set(names)) == len(names)


def test_presets_are_all_kernels_but_the_head_and_the_router(family_config):
  spec = jlora.LoraSpec(targets=('attention', 'mlp'))
  shapes = layout.shapes(family_config)
  found = tree.matching(
    families.resolve(spec, family_config).targets, list(shapes)
  )
  others = {'lm_head/kernel', 'layers/mlp/router/kernel'}
  kernels = {path for path in shapes if path.endswith('/kernel')}
  assert set(found) == kernels - others


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
