"""config.json is read as transformers reads it, or refused by field."""

import dataclasses

import pytest

from jlora.errors import BaseModelError
from jlora.models.families import FAMILIES
from jlora.models.hf_config import read_config, write_config
from jlora.models.rope_scaling import Llama3Scaling, YarnScaling

MINIMAL = {
  'vocab_size': 96,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
}
LLAMA = {'model_type': 'llama', **MINIMAL}
LLAMA_3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


def test_a_config_survives_the_form_of_hugging_face(family_config):
  assert read_config(write_config(family_config)) == family_config


def test_transformers_reads_a_config_as_it_was_meant(family_config):
  pytest.importorskip('torch')
  from transformers import AutoConfig

  fields = write_config(family_config)
  oracle = AutoConfig.for_model(fields.pop('model_type'), **fields)
  assert read_config(oracle.to_dict()) == family_config


@pytest.mark.parametrize('family', FAMILIES)
def test_defaults_are_those_of_transformers(family):
  pytest.importorskip('torch')
  from transformers import AutoConfig

  heads = {'num_key_value_heads': 4}
  oracle = AutoConfig.for_model(family, **MINIMAL, **heads).to_dict()
  given = {'model_type': family, **MINIMAL, **heads}
  assert read_config(given) == read_config(oracle)


def test_rope_fields_of_older_transformers_are_read():
  config = read_config({**LLAMA, 'rope_theta': 5e5, 'rope_scaling': LLAMA_3})
  assert config.rope_theta == 5e5
  assert config.rope_scaling == Llama3Scaling(factor=8.0)
  yarn = {
    'type': 'yarn',
    'factor': 4.0,
    'original_max_position_embeddings': 32768,
  }
  config = read_config({**LLAMA, 'rope_scaling': yarn})
  expected = YarnScaling(factor=4.0, original_max_positions=32768)
  assert config.rope_scaling == expected


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model_type': 'gpt_neox'}, "'gpt_neox'"),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ({'sliding_window': 64}, 'sliding_window=64'),
    ({'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0'),
    ({'num_local_experts': 8}, 'num_local_experts=8'),
    ({'rope_scaling': {'type': 'ntk', 'factor': 2.0}}, "'ntk'"),
    ({'rope_scaling': {'type': 'longrope', 'factor': 2.0}}, 'short_factor'),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 2.0}}, 'low_freq'),
    ({'model_type': 'mistral', 'attention_bias': True}, 'attention_bias=True'),
    (
      {
        'model_type': 'qwen3',
        'use_sliding_window': True,
        'layer_types': [
          'full_attention',
          'chunked_attention',
          'full_attention',
        ],
      },
      'chunked_attention',
    ),
    ({'model_type': 'smollm3', 'no_rope_layers': [1, 0]}, 'a list of 3'),
    ({'model_type': 'smollm3', 'no_rope_layer_interval': 0}, 'interval=0'),
    ({'model_type': 'mistral', 'sliding_window': '7'}, "window='7'"),
    ({'rope_scaling': {'type': 'linear', 'factor': 'x'}}, "factor='x'"),
  ],
)
def test_what_the_decoder_does_not_compute_is_refused(fields, message):
  with pytest.raises(BaseModelError, match=message):
    read_config({**LLAMA, **fields})


def test_notes_and_fields_that_are_off_are_no_features():
  notes = {
    '_name_or_path': 'x',
    'transformers.js_config': {'dtype': 'q4'},
    'torch_dtype': 'bfloat16',
    'rope_interleaved': False,
    'quantization_config': None,
  }
  assert read_config({**LLAMA, **notes}) == read_config(LLAMA)


@pytest.mark.parametrize('field', sorted(MINIMAL))
def test_a_missing_size_is_named(field):
  fields = {k: v for k, v in LLAMA.items() if k != field}
  with pytest.raises(BaseModelError, match=field):
    read_config(fields)


def test_windows_are_those_of_the_layers_that_have_them(family_config):
  if family_config.family == 'mistral':
    off = dataclasses.replace(
      family_config, sliding_window=None, local_layers=()
    )
    assert read_config(write_config(off)) == off
  local = family_config.local_layers
  assert (family_config.sliding_window is None) == (local == ())
