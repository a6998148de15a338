import dataclasses

import pytest

import jlora
from jlora.errors import BaseModelError, ConfigError
from jlora.models import families
from jlora.models.config import DecoderConfig, RopeScaling

CONFIG = DecoderConfig(
  vocab_size=96,
  embed_dim=32,
  mlp_dim=48,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=12,
)
MINIMAL = {
  'model_type': 'llama',
  'vocab_size': 96,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
}


@pytest.mark.parametrize(
  'config',
  [
    CONFIG,
    dataclasses.replace(CONFIG, tie_embeddings=False, rope_theta=5e5),
    dataclasses.replace(CONFIG, rope_scaling=RopeScaling(factor=32.0)),
  ],
)
def test_a_config_survives_the_form_of_hugging_face(config):
  assert families.from_hf_config(families.to_hf_config(config)) == config


def test_transformers_reads_a_config_as_it_was_meant():
  pytest.importorskip('torch')
  from transformers import LlamaConfig

  config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(factor=8.0))
  oracle = LlamaConfig(**families.to_hf_config(config))
  assert families.from_hf_config(oracle.to_dict()) == config


def test_defaults_are_those_of_transformers():
  pytest.importorskip('torch')
  from transformers import LlamaConfig

  oracle = LlamaConfig(**MINIMAL).to_dict()
  assert families.from_hf_config(MINIMAL) == families.from_hf_config(oracle)


def test_rope_fields_of_older_transformers_are_read():
  fields = {
    **MINIMAL,
    'rope_theta': 5e5,
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    },
  }
  config = families.from_hf_config(fields)
  assert config.rope_theta == 5e5
  assert config.rope_scaling == RopeScaling(factor=8.0)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model_type': 'gemma3'}, "'gemma3'"),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ({'attention_bias': True}, 'attention_bias=True'),
    ({'mlp_bias': True}, 'mlp_bias=True'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 2.0}}, "'yarn'"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 2.0}}, 'low_freq'),
  ],
)
def test_what_the_decoder_does_not_compute_is_refused(fields, message):
  with pytest.raises(BaseModelError, match=message):
    families.from_hf_config({**MINIMAL, **fields})


@pytest.mark.parametrize('field', sorted(MINIMAL.keys() - {'model_type'}))
def test_a_missing_size_is_named(field):
  fields = {k: v for k, v in MINIMAL.items() if k != field}
  with pytest.raises(BaseModelError, match=field):
    families.from_hf_config(fields)


def test_every_leaf_has_one_name_a_layer():
  for weight in families.weights(CONFIG):
    assert len(weight.modules) == (3 if weight.stacked else 1)
    assert len(set(weight.modules)) == len(weight.modules)


def test_the_head_is_the_embedding_only_where_it_is_tied():
  untied = dataclasses.replace(CONFIG, tie_embeddings=False)
  assert families.head_path(CONFIG) == 'embed/embedding'
  assert families.head_path(untied) == 'lm_head/kernel'
  paths = {weight.path for weight in families.weights(CONFIG)}
  assert 'lm_head/kernel' not in paths


def test_presets_become_patterns_over_this_family():
  spec = jlora.LoraSpec(targets=('attention', 'layers/mlp/up_proj/kernel'))
  found = families.resolve(spec, CONFIG)
  assert found.targets == (
    'layers/attention/[qkvo]_proj/kernel',
    'layers/mlp/up_proj/kernel',
  )
  assert found.axes == families.AXES
  assert families.resolve(found, CONFIG) == found


def test_a_word_that_is_no_preset_is_refused():
  with pytest.raises(ConfigError, match="'attn' is no preset"):
    families.resolve(jlora.LoraSpec(targets='attn'), CONFIG)
  with pytest.raises(ConfigError, match='stands alone'):
    families.resolve(jlora.LoraSpec(targets=('all-linear', 'mlp')), CONFIG)
