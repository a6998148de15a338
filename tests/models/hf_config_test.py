"""config.json is read as transformers reads it, or refused by field."""

import dataclasses

import pytest

from jlora.errors import BaseModelError
from jlora.models.families import FAMILIES
from jlora.models.hf_config import read_config, write_config
from jlora.models.rope_scaling import Llama3Scaling, YarnScaling
from tests.decoders import make_config

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
    (
      {'rope_scaling': {'type': 'linear', 'factor': 2, 'mscale': 3}},
      'mscale=3',
    ),
    (
      {
        'model_type': 'phi3',
        'rope_scaling': {
          'type': 'longrope',
          'short_factor': [1.0],
          'long_factor': [1.0],
        },
      },
      'a list of 4',
    ),
    ({'model_type': 'phi3', 'full_attn_mod': 2}, 'full_attn_mod=2'),
    ({'model_type': 'qwen3_moe', 'mlp_only_layers': [1]}, 'mlp_only_layers'),
    (
      {'model_type': 'gemma2', 'hidden_activation': 'relu'},
      'hidden_activation',
    ),
    ({'use_sliding_window': True}, 'use_sliding_window=True'),
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


def test_a_window_may_be_off():
  config = make_config('mistral')
  off = dataclasses.replace(config, sliding_window=None, local_layers=())
  assert read_config(write_config(off)) == off


# Fields of files that were published, beside the sizes.
PUBLISHED = {
  'phi-4-mini': {
    'model_type': 'phi3',
    'auto_map': {'AutoModelForCausalLM': 'modeling_phi3.Phi3ForCausalLM'},
    'embd_pdrop': 0.0,
    'full_attn_mod': 1,
    'interpolate_factor': 1,
    'lm_head_bias': False,
    'mlp_bias': False,
    'original_max_position_embeddings': 4096,
    'partial_rotary_factor': 0.5,
    'rope_scaling': {
      'type': 'longrope',
      'short_factor': [1.0, 1.5],
      'long_factor': [1.0, 2.0],
    },
    'rope_theta': 10000.0,
    'sliding_window': 262144,
  },
  'gemma-2-9b': {
    'model_type': 'gemma2',
    'cache_implementation': 'hybrid',
    'final_logit_softcapping': 30.0,
    'head_dim': 8,
    'hidden_act': 'gelu',
    'hidden_activation': 'gelu_pytorch_tanh',
    'num_key_value_heads': 2,
    'query_pre_attn_scalar': 8,
    'sliding_window_size': 4096,
  },
  'gemma-3-1b': {
    'model_type': 'gemma3_text',
    'attn_logit_softcapping': None,
    'cache_implementation': 'hybrid',
    'head_dim': 8,
    'hidden_activation': 'gelu_pytorch_tanh',
    'num_key_value_heads': 1,
    'rope_local_base_freq': 10000,
    'rope_scaling': None,
    'rope_theta': 1000000,
    'sliding_window': 512,
    'sliding_window_pattern': 6,
  },
  'qwen3-30b-a3b': {
    'model_type': 'qwen3_moe',
    'decoder_sparse_step': 1,
    'head_dim': 8,
    'max_window_layers': 48,
    'mlp_only_layers': [],
    'moe_intermediate_size': 24,
    'norm_topk_prob': True,
    'num_experts': 8,
    'num_experts_per_tok': 2,
    'num_key_value_heads': 2,
    'output_router_logits': False,
    'rope_scaling': None,
    'router_aux_loss_coef': 0.001,
    'sliding_window': None,
    'use_qk_norm': True,
    'use_sliding_window': False,
  },
  'mixtral-8x7b': {
    'model_type': 'mixtral',
    'num_experts_per_tok': 2,
    'num_key_value_heads': 2,
    'num_local_experts': 8,
    'output_router_logits': False,
    'rope_theta': 1000000.0,
    'router_aux_loss_coef': 0.02,
    'sliding_window': None,
  },
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_fields_are_read_as_transformers_reads_them(name):
  pytest.importorskip('torch')
  from transformers import AutoConfig

  fields = {**MINIMAL, **PUBLISHED[name]}
  given = {
    k: v for k, v in fields.items() if k not in ('model_type', 'auto_map')
  }
  oracle = AutoConfig.for_model(fields['model_type'], **given)
  known = {
    k: v for k, v in oracle.to_dict().items() if k not in PUBLISHED[name]
  }
  again = read_config({**PUBLISHED[name], **known})
  assert read_config(fields) == read_config(oracle.to_dict()) == again


def test_gpt2_xl_is_read_as_published():
  fields = {
    'model_type': 'gpt2',
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'n_ctx': 1024,
    'n_embd': 32,
    'n_head': 4,
    'n_layer': 3,
    'n_positions': 1024,
    'output_past': True,
    'predict_special_tokens': True,
    'summary_activation': None,
    'task_specific_params': {'text-generation': {'do_sample': True}},
    'vocab_size': 96,
  }
  found = read_config(fields)
  assert (found.mlp_dim, found.max_positions, found.heads) == (128, 1024, 4)
