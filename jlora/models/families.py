"""The one home of parameter names: Hugging Face's, ours, and what they mean."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jlora.errors import BaseModelError, ConfigError
from jlora.models.config import DecoderConfig, RopeScaling

# Path -> HF name, {} for the layer. HF stores kernels as [out, in].
_NAMES = {
  'embed/embedding': 'model.embed_tokens',
  'layers/attention_norm/scale': 'model.layers.{}.input_layernorm',
  'layers/attention/q_proj/kernel': 'model.layers.{}.self_attn.q_proj',
  'layers/attention/k_proj/kernel': 'model.layers.{}.self_attn.k_proj',
  'layers/attention/v_proj/kernel': 'model.layers.{}.self_attn.v_proj',
  'layers/attention/o_proj/kernel': 'model.layers.{}.self_attn.o_proj',
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
    modules: HF module paths, whose tensor is `<module>.weight`: one a layer
      for a stacked leaf, else one.
    stacked: Whether the leaf has a leading axis over `modules`.
    transposed: Whether HF stores `[out, in]` where the leaf is `[in, out]`.
    shape: The leaf's shape, the stacked axis included.
  """

  path: str
  modules: tuple[str, ...]
  stacked: bool
  transposed: bool
  shape: tuple[int, ...]


def weights(config: DecoderConfig) -> Iterator[Weight]:
  """Yields every leaf of a decoder with its Hugging Face names."""
  known = _shapes(config)
  for path, module in _NAMES.items():
    if path == 'lm_head/kernel' and config.tie_embeddings:
      continue
    stacked = '{}' in module
    count = config.layers if stacked else 1
    yield Weight(
      path=path,
      modules=tuple(module.format(i) for i in range(count)),
      stacked=stacked,
      transposed=path.endswith('/kernel'),
      shape=known[path],
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
  return {
    'embed/embedding': (c.vocab_size, c.embed_dim),
    'layers/attention_norm/scale': (c.layers, c.embed_dim),
    'layers/attention/q_proj/kernel': (c.layers, c.embed_dim, wide),
    'layers/attention/k_proj/kernel': (c.layers, c.embed_dim, narrow),
    'layers/attention/v_proj/kernel': (c.layers, c.embed_dim, narrow),
    'layers/attention/o_proj/kernel': (c.layers, wide, c.embed_dim),
    'layers/mlp_norm/scale': (c.layers, c.embed_dim),
    'layers/mlp/gate_proj/kernel': (c.layers, c.embed_dim, c.mlp_dim),
    'layers/mlp/up_proj/kernel': (c.layers, c.embed_dim, c.mlp_dim),
    'layers/mlp/down_proj/kernel': (c.layers, c.mlp_dim, c.embed_dim),
    'final_norm/scale': (c.embed_dim,),
    'lm_head/kernel': (c.embed_dim, c.vocab_size),
  }


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
  del config  # one family so far: every decoder has these leaves
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


# Fields of config.json whose other values would need other arithmetic.
_REQUIRED = {
  'hidden_act': ('silu',),
  'attention_bias': (False, None),
  'mlp_bias': (False, None),
  'sliding_window': (None,),
}


def from_hf_config(fields: dict[str, Any]) -> DecoderConfig:
  """Reads the sizes of a model from its config.json.

  Args:
    fields: The parsed file, of `model_type` llama.

  Returns:
    The decoder's config.

  Raises:
    BaseModelError: The model is of another family, or uses a feature that
      this decoder does not compute; the field is named.
  """
  kind = fields.get('model_type')
  if kind != 'llama':
    raise BaseModelError(
      f'model_type {kind!r} is not supported; this version trains llama models'
    )
  for field, allowed in _REQUIRED.items():
    if field in fields and fields[field] not in allowed:
      raise BaseModelError(
        f'config.json has {field}={fields[field]!r}, which this decoder does'
        f' not compute; it needs {allowed[0]!r}'
      )
  try:
    return _read_llama(fields)
  except KeyError as error:
    raise BaseModelError(
      f'config.json has no field {error.args[0]!r}, which a llama model needs'
    ) from error


def _read_llama(fields: dict[str, Any]) -> DecoderConfig:
  heads = fields['num_attention_heads']
  rope = fields.get('rope_parameters') or fields.get('rope_scaling') or {}
  theta = rope.get('rope_theta', fields.get('rope_theta', 10000.0))
  return DecoderConfig(
    vocab_size=fields['vocab_size'],
    embed_dim=fields['hidden_size'],
    mlp_dim=fields['intermediate_size'],
    layers=fields['num_hidden_layers'],
    heads=heads,
    kv_heads=fields.get('num_key_value_heads') or heads,
    head_dim=fields.get('head_dim') or fields['hidden_size'] // heads,
    max_positions=fields.get('max_position_embeddings', 2048),
    rope_theta=float(theta),
    rope_scaling=_read_scaling(rope),
    norm_eps=fields.get('rms_norm_eps', 1e-6),
    tie_embeddings=bool(fields.get('tie_word_embeddings', False)),
  )


def _read_scaling(rope: dict[str, Any]) -> RopeScaling | None:
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return None
  if kind != 'llama3':
    raise BaseModelError(
      f"rope_type {kind!r} is not supported; use 'default' or 'llama3'"
    )
  return RopeScaling(
    factor=rope['factor'],
    low_freq_factor=rope['low_freq_factor'],
    high_freq_factor=rope['high_freq_factor'],
    original_max_positions=rope['original_max_position_embeddings'],
  )


def to_hf_config(config: DecoderConfig) -> dict[str, Any]:
  """Returns the fields of a config.json that `transformers` loads."""
  rope = {'rope_type': 'default', 'rope_theta': config.rope_theta}
  if (scaling := config.rope_scaling) is not None:
    rope |= {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low_freq_factor,
      'high_freq_factor': scaling.high_freq_factor,
      'original_max_position_embeddings': scaling.original_max_positions,
    }
  return {
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': False,
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'hidden_size': config.embed_dim,
    'intermediate_size': config.mlp_dim,
    'max_position_embeddings': config.max_positions,
    'mlp_bias': False,
    'model_type': 'llama',
    'num_attention_heads': config.heads,
    'num_hidden_layers': config.layers,
    'num_key_value_heads': config.kv_heads,
    'rms_norm_eps': config.norm_eps,
    'rope_parameters': rope,
    'tie_word_embeddings': config.tie_embeddings,
    'vocab_size': config.vocab_size,
  }
