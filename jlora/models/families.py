"""The one home of families: their names, sharding rules and presets."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jlora.errors import ConfigError
from jlora.models.config import DecoderConfig

_QKV = ('q_proj', 'k_proj', 'v_proj')
_MLP = ('gate_proj', 'up_proj', 'down_proj')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What the models of one `model_type` have in common.

  Attributes:
    architecture: Class in transformers.
    defaults: Of fields that config.json may lack, as in transformers.
    needs: Fields of config.json whose other values would need other
      arithmetic, with the values that are computed.
    biases: Linear layers that add a bias.
    bias_fields: Fields of config.json that say whether others do.
    qk_norm: Whether each head's queries and keys are normalized.
    window: Which layers see a window of `sliding_window` tokens: 'all', or
      those of `layer_types` where `use_sliding_window` is 'switched' on. None
      for models that know no window.
    skips_rope: Whether there are layers without rotary embeddings. They are
      those that see a window, where config.json has no `layer_types`.
  """

  architecture: str
  defaults: Mapping[str, Any]
  needs: Mapping[str, tuple[Any, ...]]
  biases: tuple[str, ...] = ()
  bias_fields: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  qk_norm: bool = False
  window: str | None = None
  skips_rope: bool = False


_SILU = {'hidden_act': ('silu',)}
_NO_BIAS = {'attention_bias': (False, None), 'mlp_bias': (False, None)}

FAMILIES = {
  'llama': Family(
    architecture='LlamaForCausalLM',
    defaults={},
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
    defaults={
      'max_position_embeddings': 32768,
      'max_window_layers': 28,
      'num_key_value_heads': 32,
      'sliding_window': 4096,
    },
    needs={**_SILU, 'mlp_bias': (False, None)},
    biases=_QKV,
    window='switched',
  ),
  'qwen3': Family(
    architecture='Qwen3ForCausalLM',
    defaults={
      'head_dim': 128,
      'max_position_embeddings': 32768,
      'max_window_layers': 28,
      'num_key_value_heads': 32,
      'sliding_window': 4096,
    },
    needs={**_SILU, 'mlp_bias': (False, None)},
    bias_fields={'attention_bias': (*_QKV, 'o_proj')},
    qk_norm=True,
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
}

# Path -> HF name, {} for the layer. HF stores kernels as [out, in].
_NAMES = {
  'embed/embedding': 'model.embed_tokens',
  'layers/attention_norm/scale': 'model.layers.{}.input_layernorm',
  'layers/attention/q_proj/kernel': 'model.layers.{}.self_attn.q_proj',
  'layers/attention/k_proj/kernel': 'model.layers.{}.self_attn.k_proj',
  'layers/attention/v_proj/kernel': 'model.layers.{}.self_attn.v_proj',
  'layers/attention/o_proj/kernel': 'model.layers.{}.self_attn.o_proj',
  'layers/attention/q_norm/scale': 'model.layers.{}.self_attn.q_norm',
  'layers/attention/k_norm/scale': 'model.layers.{}.self_attn.k_norm',
  'layers/mlp_norm/scale': 'model.layers.{}.post_attention_layernorm',
  'layers/mlp/gate_proj/kernel': 'model.layers.{}.mlp.gate_proj',
  'layers/mlp/up_proj/kernel': 'model.layers.{}.mlp.up_proj',
  'layers/mlp/down_proj/kernel': 'model.layers.{}.mlp.down_proj',
  'final_norm/scale': 'model.norm',
  'lm_head/kernel': 'lm_head',
}

# Roles of the kernels' axes; an output axis named `vocab` marks the head.
AXES = (
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
# states of all layers so.)
SHARDING = (
  (r'embed/embedding', (('tensor', 'fsdp'), None)),
  (r'layers/attention/[qkv]_proj/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/attention/o_proj/kernel', (None, ('tensor', 'fsdp'), ())),
  (r'layers/.*/([qkv]|gate|up)_proj/bias', (None, 'tensor')),
  (r'layers/mlp/(gate|up)_proj/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/mlp/down_proj/kernel', (None, ('tensor', 'fsdp'), ())),
  (r'lm_head/kernel', (None, ('tensor', 'fsdp'))),
  (r'.*', ()),
)

PRESETS = {
  'attention': (r'layers/attention/[qkvo]_proj/kernel',),
  'mlp': (r'layers/mlp/(gate|up|down)_proj/kernel',),
}

Spec = TypeVar('Spec')


@dataclasses.dataclass(frozen=True)
class Weight:
  """One leaf of the parameters and where Hugging Face keeps it.

  Attributes:
    path: The leaf's path, joined with `/`.
    modules: HF module paths: one a layer for a stacked leaf, else one.
    stacked: Whether the leaf has a leading axis over `modules`.
    transposed: Whether HF stores `[out, in]` where the leaf is `[in, out]`.
    shape: The leaf's shape, the stacked axis included.
    kind: Name of the tensor in its module: 'weight' or 'bias'.
  """

  path: str
  modules: tuple[str, ...]
  stacked: bool
  transposed: bool
  shape: tuple[int, ...]
  kind: str = 'weight'

  @property
  def tensors(self) -> tuple[str, ...]:
    """Names of the tensors, such as `model.norm.weight`."""
    return tuple(f'{module}.{self.kind}' for module in self.modules)


def weights(config: DecoderConfig) -> Iterator[Weight]:
  """Yields every leaf of a decoder with its Hugging Face names."""
  for path, shape in _shapes(config).items():
    parent, kind = path.rsplit('/', 1)
    module = _NAMES.get(path) or _NAMES[f'{parent}/kernel']
    stacked = '{}' in module
    count = config.layers if stacked else 1
    yield Weight(
      path=path,
      modules=tuple(module.format(i) for i in range(count)),
      stacked=stacked,
      transposed=kind == 'kernel',
      shape=shape,
      kind='bias' if kind == 'bias' else 'weight',
    )


def shapes(
  config: DecoderConfig, dtype: Any = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns every leaf of a decoder by path, without its numbers."""
  return {
    weight.path: jax.ShapeDtypeStruct(weight.shape, dtype)
    for weight in weights(config)
  }


def _shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
  wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
  kernels = {
    'attention/q_proj': (c.embed_dim, wide),
    'attention/k_proj': (c.embed_dim, narrow),
    'attention/v_proj': (c.embed_dim, narrow),
    'attention/o_proj': (wide, c.embed_dim),
    'mlp/gate_proj': (c.embed_dim, c.mlp_dim),
    'mlp/up_proj': (c.embed_dim, c.mlp_dim),
    'mlp/down_proj': (c.mlp_dim, c.embed_dim),
  }
  layer = {
    'attention_norm/scale': (c.embed_dim,),
    'mlp_norm/scale': (c.embed_dim,),
  }
  for name, shape in kernels.items():
    layer[f'{name}/kernel'] = shape
    if name.split('/')[1] in c.biases:
      layer[f'{name}/bias'] = shape[1:]
  if c.qk_norm:
    layer['attention/q_norm/scale'] = (c.head_dim,)
    layer['attention/k_norm/scale'] = (c.head_dim,)
  found = {'embed/embedding': (c.vocab_size, c.embed_dim)}
  found |= {f'layers/{path}': (c.layers, *s) for path, s in layer.items()}
  found['final_norm/scale'] = (c.embed_dim,)
  if not c.tie_embeddings:
    found['lm_head/kernel'] = (c.embed_dim, c.vocab_size)
  return found


def head_path(config: DecoderConfig) -> str:
  """Returns the path of the leaf that makes logits."""
  return 'embed/embedding' if config.tie_embeddings else 'lm_head/kernel'


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
  del config  # the leaves of all families have the same names
  targets = spec.targets
  if targets != 'all-linear':
    words = (targets,) if isinstance(targets, str) else targets
    targets = tuple(p for word in words for p in _patterns(word))
  own = tuple(entry for entry in AXES if entry not in spec.axes)
  return dataclasses.replace(spec, targets=targets, axes=(*spec.axes, *own))


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
