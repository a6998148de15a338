"""Gemma 2 and 3.

Norms are stored as their distance from one, embeddings are scaled, attention
and feed-forward block are normalized on both sides, and most layers see a
window only. Gemma 3's windows have rotary wavelengths of their own.

References:
  Gemma Team, `Gemma 2 <https://arxiv.org/abs/2408.00118>`_, section 2;
  `Gemma 3 <https://arxiv.org/abs/2503.19786>`_, section 2.
"""

from jlora.models.family import Family

_NAMES = {
  'layers/post_attention_norm': 'model.layers.{}.post_attention_layernorm',
  'layers/mlp_norm': 'model.layers.{}.pre_feedforward_layernorm',
  'layers/post_mlp_norm': 'model.layers.{}.post_feedforward_layernorm',
}
_TRAITS = {
  'activation': 'gelu',
  'norm': 'rms_plus_one',
  'post_norms': True,
  'scaled_embeddings': True,
}
_FIELDS = {
  'query_scalar': 'query_pre_attn_scalar',
  'attention_cap': 'attn_logit_softcapping',
  'logit_cap': 'final_logit_softcapping',
}
_NEEDS = {
  'hidden_act': ('gelu_pytorch_tanh',),
  'attention_bias': (False, None),
  'use_bidirectional_attention': (False, None),
}
_DEFAULTS = {
  'head_dim': 256,
  'num_key_value_heads': 4,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'tie_word_embeddings': True,
}

GEMMA_2 = Family(
  architecture='Gemma2ForCausalLM',
  traits=_TRAITS,
  names=_NAMES,
  aliases={'hidden_activation': 'hidden_act'},
  fields=_FIELDS,
  defaults={
    **_DEFAULTS,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'max_position_embeddings': 8192,
  },
  needs=_NEEDS,
  window='mixed',
  period=2,
)

GEMMA_3 = Family(
  architecture='Gemma3ForCausalLM',
  traits={**_TRAITS, 'qk_norm': True},
  names=_NAMES,
  aliases={'hidden_activation': 'hidden_act'},
  fields=_FIELDS,
  defaults={**_DEFAULTS, 'max_position_embeddings': 131072, 'rope_theta': 1e6},
  needs=_NEEDS,
  window='mixed',
  period=6,
  local_theta=1e4,
)
