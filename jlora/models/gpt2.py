"""GPT-2: learned positions, LayerNorm, and kernels stored as they are used.

References:
  Radford et al., "Language Models are Unsupervised Multitask Learners", 2.3.
"""

from jlora.models.family import Family

_NAMES = {
  'embed': 'transformer.wte',
  'position_embed': 'transformer.wpe',
  'layers/attention_norm': 'transformer.h.{}.ln_1',
  'layers/attention/qkv_proj': 'transformer.h.{}.attn.c_attn',
  'layers/attention/o_proj': 'transformer.h.{}.attn.c_proj',
  'layers/mlp_norm': 'transformer.h.{}.ln_2',
  'layers/mlp/up_proj': 'transformer.h.{}.mlp.c_fc',
  'layers/mlp/down_proj': 'transformer.h.{}.mlp.c_proj',
  'final_norm': 'transformer.ln_f',
}

GPT_2 = Family(
  architecture='GPT2LMHeadModel',
  traits={
    'activation': 'gelu',
    'biases': ('qkv_proj', 'o_proj', 'up_proj', 'down_proj'),
    'fused': ('qkv_proj',),
    'gated': False,
    'learned_positions': True,
    'norm': 'layer',
  },
  names=_NAMES,
  plain=True,
  aliases={
    'activation_function': 'hidden_act',
    'layer_norm_epsilon': 'rms_norm_eps',
    'n_embd': 'hidden_size',
    'n_head': 'num_attention_heads',
    'n_layer': 'num_hidden_layers',
    'n_positions': 'max_position_embeddings',
  },
  fields={'mlp_dim': 'n_inner'},
  mlp_ratio=4,
  defaults={
    'max_position_embeddings': 1024,
    'rms_norm_eps': 1e-5,
    'tie_word_embeddings': True,
  },
  needs={
    'hidden_act': ('gelu_new', 'gelu_pytorch_tanh'),
    'add_cross_attention': (False, None),
    'reorder_and_upcast_attn': (False, None),
    'scale_attn_by_inverse_layer_idx': (False, None),
    'scale_attn_weights': (True, None),
  },
  buffers=('.attn.bias', '.attn.masked_bias'),
  prefix='transformer.',
)
