"""Small decoders of every family, and the same in transformers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jlora.core.tree import leaves_by_path, nest
from jlora.models import layout
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.models.hf_config import write_config
from jlora.models.rope_scaling import (
  DynamicScaling,
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  YarnScaling,
)

CONFIG = DecoderConfig(
  vocab_size=96,
  embed_dim=32,
  mlp_dim=48,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=12,  # not embed_dim / heads
  max_positions=64,
)
QKV = ('q_proj', 'k_proj', 'v_proj')
MLP = ('gate_proj', 'up_proj', 'down_proj')
WINDOW = {'sliding_window': 7}
GEMMA = {
  'activation': 'gelu',
  'norm': 'rms_plus_one',
  'post_norms': True,
  'scaled_embeddings': True,
  'query_scalar': 10,
  'local_layers': (0, 2),
  **WINDOW,
}
PHI = {'fused': ('qkv_proj', 'gate_up_proj'), 'head_dim': 8}
MOE = {'experts': 5, 'experts_per_token': 2}
LONG = LongScaling(
  short_factor=(1.0, 1.1, 1.2),
  long_factor=(1.5, 2.0, 3.0),
  original_max_positions=16,
  max_positions=64,
)
YARN = YarnScaling(factor=4.0, original_max_positions=16)

# A row a family, and one for each of its switches.
ROWS = {
  'llama': {},
  'llama untied': {'tie_embeddings': False, 'kv_heads': 4},
  'llama one kv head': {'kv_heads': 1},
  'llama biases': {'biases': (*QKV, 'o_proj', *MLP)},
  'llama linear': {'rope_scaling': LinearScaling(factor=3.0)},
  'llama dynamic': {
    'rope_scaling': DynamicScaling(factor=4.0, max_positions=16),
    'max_positions': 16,
  },
  'llama llama3': {
    'rope_scaling': Llama3Scaling(factor=8.0, original_max_positions=32),
    'rope_theta': 500.0,
  },
  'llama yarn': {'rope_scaling': YARN, 'rope_theta': 500.0},
  'mistral': {**WINDOW, 'local_layers': (0, 1, 2)},
  'mistral whole': {},
  'qwen2': {'biases': QKV, 'head_dim': 8},
  'qwen2 windows': {
    **WINDOW,
    'biases': QKV,
    'head_dim': 8,
    'local_layers': (1, 2),
  },
  'qwen3': {'qk_norm': True},
  'qwen3 windows': {'qk_norm': True, **WINDOW, 'local_layers': (0, 2)},
  'qwen3 biases': {'qk_norm': True, 'biases': (*QKV, 'o_proj')},
  'smollm3': {'unrotated_layers': (1,), 'head_dim': 8, 'rope_theta': 2e6},
  'smollm3 windows': {
    'unrotated_layers': (0, 2),
    'head_dim': 8,
    **WINDOW,
    'local_layers': (0, 2),
  },
  'phi3': {**PHI, **WINDOW, 'local_layers': (0, 1, 2)},
  'phi3 partly rotated': {**PHI, 'rotary_share': 0.75, 'tie_embeddings': False},
  'phi3 longrope': {**PHI, 'rotary_share': 0.75, 'rope_scaling': LONG},
  'gemma2': {**GEMMA, 'attention_cap': 5.0, 'logit_cap': 3.0},
  'gemma3_text': {
    **GEMMA,
    'qk_norm': True,
    'rope_theta': 500.0,
    'local_rope_theta': 50.0,
    'rope_scaling': LinearScaling(factor=3.0),
  },
  'gemma3_text whole': {
    **GEMMA,
    'qk_norm': True,
    'local_layers': (),
    'sliding_window': None,
    'local_rope_theta': 50.0,
  },
  'gpt2': {
    'activation': 'gelu',
    'biases': ('qkv_proj', 'o_proj', 'up_proj', 'down_proj'),
    'fused': ('qkv_proj',),
    'gated': False,
    'head_dim': 8,
    'kv_heads': 4,
    'learned_positions': True,
    'norm': 'layer',
  },
  'mixtral': {**MOE, **WINDOW, 'local_layers': (0, 1, 2), 'head_dim': 8},
  'qwen3_moe': {**MOE, 'qk_norm': True, 'normalize_experts': False},
  'qwen3_moe untied': {
    **MOE,
    'biases': (*QKV, 'o_proj'),
    'experts_per_token': 1,
    'qk_norm': True,
    'tie_embeddings': False,
  },
}

# PEFT looks for the keys of patterns among modules only, where it warns; it
# uses those of parameters all the same, as logits show.
PATTERNS_OF_PARAMETERS = (
  'ignore:The following .*_pattern keys did not .*'
  r"\[('[^']*(gate_up_proj|experts.down_proj|gate.weight)'(, )?)+\]"
)


def make_config(name):
  """Returns the small decoder of a row."""
  return dataclasses.replace(CONFIG, family=name.split()[0], **ROWS[name])


@pytest.fixture(params=ROWS)
def family_config(request):
  """A small decoder of every family, with every switch."""
  return make_config(request.param)


def make_params(config, seed=0):
  """Returns random parameters of a decoder, norms about one."""
  rng = np.random.default_rng(seed)
  return nest(
    {
      weight.path: rng.normal(
        float(weight.path.endswith('scale')), 0.2, weight.shape
      ).astype('f4')
      for weight in layout.weights(config)
    }
  )


def _by_leaves():
  """Returns a row for each set of leaves in a family."""
  rows = {}
  for name in ROWS:
    config = make_config(name)
    rows.setdefault((config.family, *layout.shapes(config)), name)
  return list(rows.values())


@pytest.fixture(params=_by_leaves())
def leaves_config(request):
  """A small decoder of every family, with every set of leaves."""
  return make_config(request.param)


@functools.cache
def compiled(config):
  """Returns a decoder's `apply`, compiled once for tests that share shapes."""
  return jax.jit(Decoder(config).apply)


def stored(config, params):
  """Returns a decoder's tensors as Hugging Face stores them, by name."""
  leaves, tensors = leaves_by_path(params), {}
  for weight in layout.weights(config):
    leaf = np.asarray(leaves[weight.path])
    for place, name in weight.places():
      part = leaf[place]
      tensors[name] = part.T if weight.transposed else part
  return tensors


def make_oracle(config, params):
  """Returns the same model in transformers, its state set by name."""
  torch = pytest.importorskip('torch')
  from transformers import AutoConfig, AutoModelForCausalLM

  # SmolLM3's default for padding lies beyond a small vocabulary.
  fields = {**write_config(config), 'pad_token_id': None}
  fields = AutoConfig.for_model(fields.pop('model_type'), **fields)
  oracle = AutoModelForCausalLM.from_config(fields, attn_implementation='eager')
  state = {
    name: torch.tensor(np.ascontiguousarray(tensor))
    for name, tensor in stored(config, params).items()
  }
  if config.tie_embeddings:
    embedding = layout.module_of(config, 'embed')
    state['lm_head.weight'] = state[f'{embedding}.weight']
  if config.experts:  # held in another form than they are stored in
    oracle, info = type(oracle).from_pretrained(
      None,
      config=fields,
      state_dict=state,
      output_loading_info=True,
      attn_implementation='eager',
    )
    assert not info['missing_keys'] | info['unexpected_keys']
  else:
    oracle.load_state_dict(state, strict=True)
  return oracle.eval()


def assert_near(found, expected):
  """Holds logits to 2e-5 of their scale."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=2e-5)
