"""The one home of families: their names, sharding rules and presets."""

import dataclasses
import re
from typing import TypeVar

from jlora.errors import ConfigError
from jlora.models import gemma, gpt2
from jlora.models.config import DecoderConfig
from jlora.models.family import Family

_QKV = ('q_proj', 'k_proj', 'v_proj')
_MLP = ('gate_proj', 'up_proj', 'down_proj')
_SILU = {'hidden_act': ('silu',)}
_NO_BIAS = {'attention_bias': (False, None), 'mlp_bias': (False, None)}

# Module here -> module of Hugging Face; {} for the layer, then the expert.
NAMES = {
  'embed': 'model.embed_tokens',
  'layers/attention_norm': 'model.layers.{}.input_layernorm',
  'layers/attention/q_proj': 'model.layers.{}.self_attn.q_proj',
  'layers/attention/k_proj': 'model.layers.{}.self_attn.k_proj',
  'layers/attention/v_proj': 'model.layers.{}.self_attn.v_proj',
  'layers/attention/qkv_proj': 'model.layers.{}.self_attn.qkv_proj',
  'layers/attention/o_proj': 'model.layers.{}.self_attn.o_proj',
  'layers/attention/q_norm': 'model.layers.{}.self_attn.q_norm',
  'layers/attention/k_norm': 'model.layers.{}.self_attn.k_norm',
  'layers/mlp_norm': 'model.layers.{}.post_attention_layernorm',
  'layers/mlp/gate_proj': 'model.layers.{}.mlp.gate_proj',
  'layers/mlp/up_proj': 'model.layers.{}.mlp.up_proj',
  'layers/mlp/gate_up_proj': 'model.layers.{}.mlp.gate_up_proj',
  'layers/mlp/down_proj': 'model.layers.{}.mlp.down_proj',
  'layers/mlp/router': 'model.layers.{}.mlp.gate',
  'layers/mlp/experts/gate_proj': 'model.layers.{}.mlp.experts.{}.gate_proj',
  'layers/mlp/experts/up_proj': 'model.layers.{}.mlp.experts.{}.up_proj',
  'layers/mlp/experts/down_proj': 'model.layers.{}.mlp.experts.{}.down_proj',
  'final_norm': 'model.norm',
  'lm_head': 'lm_head',
}
_MIXTRAL = 'model.layers.{}.block_sparse_moe'
_MIXTRAL_NAMES = {
  'layers/mlp/router': _MIXTRAL + '.gate',
  'layers/mlp/experts/gate_proj': _MIXTRAL + '.experts.{}.w1',
  'layers/mlp/experts/up_proj': _MIXTRAL + '.experts.{}.w3',
  'layers/mlp/experts/down_proj': _MIXTRAL + '.experts.{}.w2',
}
_EXPERTS = {
  'model.layers.{}.mlp.gate.weight': ('layers/mlp/router',),
  'model.layers.{}.mlp.experts.gate_up_proj': (
    'layers/mlp/experts/gate_proj',
    'layers/mlp/experts/up_proj',
  ),
  'model.layers.{}.mlp.experts.down_proj': ('layers/mlp/experts/down_proj',),
}
_QWEN = {
  'max_position_embeddings': 32768,
  'max_window_layers': 28,
  'num_key_value_heads': 32,
  'sliding_window': 4096,
}
FAMILIES = {
  'llama': Family(
    architecture='LlamaForCausalLM',
    needs={**_SILU, 'sliding_window': (None,)},
    bias_fields={'attention_bias': (*_QKV, 'o_proj'), 'mlp_bias': _MLP},
  ),
  'mistral': Family(
    architecture='MistralForCausalLM',
    defaults={
      'max_position_embeddings': 131072,
      'num_key_value_heads': 8,
      'sliding_window': 4096,
    },
    needs={**_SILU, **_NO_BIAS},
    window='all',
  ),
  'qwen2': Family(
    architecture='Qwen2ForCausalLM',
    traits={'biases': _QKV},
    defaults=_QWEN,
    needs={**_SILU, 'mlp_bias': (False, None)},
    window='switched',
  ),
  'qwen3': Family(
    architecture='Qwen3ForCausalLM',
    traits={'qk_norm': True},
    defaults={**_QWEN, 'head_dim': 128},
    needs={**_SILU, 'mlp_bias': (False, None)},
    bias_fields={'attention_bias': (*_QKV, 'o_proj')},
    window='switched',
  ),
  'smollm3': Family(
    architecture='SmolLM3ForCausalLM',
    defaults={
      'max_position_embeddings': 32768,
      'no_rope_layer_interval': 4,
      'num_key_value_heads': 4,
      'rope_theta': 2e6,
      'tie_word_embeddings': True,
    },
    needs=_SILU,
    bias_fields={'attention_bias': (*_QKV, 'o_proj'), 'mlp_bias': _MLP},
    window='switched',
    skips_rope=True,
  ),
  'phi3': Family(
    architecture='Phi3ForCausalLM',
    traits={'fused': ('qkv_proj', 'gate_up_proj')},
    fields={'rotary_share': 'partial_rotary_factor'},
    defaults={
      'max_position_embeddings': 4096,
      'original_max_position_embeddings': 4096,
      'partial_rotary_factor': 1.0,
      'rms_norm_eps': 1e-5,
    },
    needs={
      **_SILU,
      **_NO_BIAS,
      'full_attn_mod': (1, None),
      'interpolate_factor': (1, None),
    },
    window='all',
  ),
  'gemma2': gemma.GEMMA_2,
  'gemma3_text': gemma.GEMMA_3,
  'gpt2': gpt2.GPT_2,
  'mixtral': Family(
    architecture='MixtralForCausalLM',
    names=_MIXTRAL_NAMES,
    fields={
      'experts': 'num_local_experts',
      'experts_per_token': 'num_experts_per_tok',
    },
    defaults={
      'max_position_embeddings': 131072,
      'num_experts_per_tok': 2,
      'num_key_value_heads': 8,
      'num_local_experts': 8,
      'rms_norm_eps': 1e-5,
      'rope_theta': 1e6,
    },
    needs=_SILU,
    window='all',
    parameters=_EXPERTS,
  ),
  'qwen3_moe': Family(
    architecture='Qwen3MoeForCausalLM',
    traits={'qk_norm': True},
    aliases={'num_experts': 'num_local_experts'},
    fields={
      'mlp_dim': 'moe_intermediate_size',
      'experts': 'num_local_experts',
      'experts_per_token': 'num_experts_per_tok',
      'normalize_experts': 'norm_topk_prob',
    },
    defaults={
      'head_dim': 128,
      'max_position_embeddings': 32768,
      'moe_intermediate_size': 768,
      'norm_topk_prob': False,
      'num_experts_per_tok': 8,
      'num_key_value_heads': 4,
      'num_local_experts': 128,
    },
    needs={
      **_SILU,
      'decoder_sparse_step': (1, None),
      'mlp_only_layers': ([], None),
      'use_qk_norm': (True, None),
      'use_sliding_window': (False, None),
    },
    bias_fields={'attention_bias': (*_QKV, 'o_proj')},
    parameters=_EXPERTS,
  ),
}

# Roles of the kernels' axes; an output axis named `vocab` marks the head.
AXES = (
  (r'layers/mlp/experts/.*/kernel', 'layers experts | in -> out'),
  (r'layers/.*/kernel', 'layers | in -> out'),
  (r'lm_head/kernel', 'embed -> vocab'),
)

# Mesh axes that cut each axis of a leaf; the first pattern that matches
# decides. A pair of products is cut as columns, then as rows, along 'tensor'.
# Along 'fsdp' all are cut as rows, and as columns, (), only where there are no
# equal parts: columns are brought together in another layout, for which XLA
# copies the codes of all layers.
# Vocabularies are cut along both axes: it is hidden states that move, which
# are smaller. (An embedding cut along its width would have XLA cut the hidden
# states of all layers so.) Kernels that stand for several are cut without
# regard to where one ends, so that activations move behind their products.
SHARDING = (
  (r'embed/embedding', (('tensor', 'fsdp'), None)),
  (r'layers/attention/[qkv]+_proj/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/attention/o_proj/kernel', (None, ('tensor', 'fsdp'), ())),
  (r'layers/.*/([qkv]+|gate|up|gate_up)_proj/bias', (None, 'tensor')),
  (r'layers/mlp/(gate|up|gate_up)_proj/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/mlp/down_proj/kernel', (None, ('tensor', 'fsdp'), ())),
  (r'layers/mlp/experts/(gate|up)_proj/kernel', (None, None, 'fsdp', 'tensor')),
  (
    r'layers/mlp/experts/down_proj/kernel',
    (None, None, ('tensor', 'fsdp'), ()),
  ),
  (r'lm_head/kernel', (None, ('tensor', 'fsdp'))),
  (r'.*', ()),
)

PRESETS = {
  'attention': (r'layers/attention/([qkv]+|o)_proj/kernel',),
  'mlp': (r'layers/mlp/(experts/)?(gate|up|gate_up|down)_proj/kernel',),
}
# Chooses among experts; neither adapted nor quantized unless a pattern says so.
_ROUTER = r'layers/mlp/router/kernel'

Spec = TypeVar('Spec')


def resolve(spec: Spec, config: DecoderConfig) -> Spec:
  """Returns `spec` with presets turned into patterns and the family's axes.

  Args:
    spec: A LoraSpec or a QuantSpec; its `targets` may hold 'attention', 'mlp'
      and, as the whole value, 'all-linear'.
    config: The decoder that the spec is for.

  Returns:
    The same spec with patterns for presets, and with this family's `axes`
    behind the spec's own, which are matched first.

  Raises:
    ConfigError: A word is neither a preset nor a pattern over paths.
  """
  targets, exclude = spec.targets, spec.exclude
  if targets != 'all-linear':
    words = (targets,) if isinstance(targets, str) else targets
    targets = tuple(p for word in words for p in _patterns(word))
  elif config.experts and _ROUTER not in exclude:
    exclude = (*exclude, _ROUTER)
  own = tuple(entry for entry in AXES if entry not in spec.axes)
  return dataclasses.replace(
    spec, targets=targets, exclude=exclude, axes=(*spec.axes, *own)
  )


def _patterns(word: str) -> tuple[str, ...]:
  if word in PRESETS:
    return PRESETS[word]
  if word == 'all-linear':
    raise ConfigError(
      "targets 'all-linear' stands alone; it cannot be one of several patterns"
    )
  if re.fullmatch(r'[a-z-]+', word):
    known = ', '.join(map(repr, ['all-linear', *PRESETS]))
    raise ConfigError(
      f'targets {word!r} is no preset ({known}) and, as a pattern over whole'
      f" paths, would match nothing; try '.*/{word}/kernel'"
    )
  return (word,)
