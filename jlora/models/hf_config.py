"""config.json of Hugging Face, read and written."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.errors import BaseModelError
from jlora.models import rope_scaling
from jlora.models.config import DecoderConfig
from jlora.models.families import FAMILIES, Family
from jlora.models.rope_scaling import RopeScaling

# Field of DecoderConfig -> field of config.json.
_SIZES = {
  'vocab_size': 'vocab_size',
  'embed_dim': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'layers': 'num_hidden_layers',
  'heads': 'num_attention_heads',
}
# Likewise of a stretch of the wavelengths, whose other fields have one name.
_ROPE = {'original_max_positions': 'original_max_position_embeddings'}
# Fields that say nothing about what is computed, or what is computed anyway.
_HARMLESS = {
  'architectures',
  'attention_dropout',
  'auto_map',
  'bos_token_id',
  'cache_implementation',
  'chunk_size_feed_forward',
  'dtype',
  'eos_token_id',
  'id2label',
  'initializer_range',
  'is_llama_config',
  'label2id',
  'max_window_layers',
  'model_type',
  'output_attentions',
  'output_hidden_states',
  'pad_token_id',
  'pretraining_tp',
  'problem_type',
  'return_dict',
  'rope_theta',
  'torch_dtype',
  'torchscript',
  'transformers_version',
  'unk_token_id',
  'unsloth_fixed',
  'unsloth_version',
  'use_cache',
}
_KNOWN = _HARMLESS | {
  *_SIZES.values(),
  'attention_bias',
  'head_dim',
  'hidden_act',
  'layer_types',
  'max_position_embeddings',
  'mlp_bias',
  'no_rope_layer_interval',
  'no_rope_layers',
  'num_key_value_heads',
  'rms_norm_eps',
  'rope_parameters',
  'rope_scaling',
  'sliding_window',
  'tie_word_embeddings',
  'use_sliding_window',
}
_WHOLE, _WINDOW = 'full_attention', 'sliding_attention'


def read_config(fields: Mapping[str, Any]) -> DecoderConfig:
  """Reads what a model is from its config.json.

  Args:
    fields: The parsed file.

  Raises:
    BaseModelError: The model is of a family that is not known, or uses a
      feature that this decoder does not compute; the field is named.
  """
  kind = fields.get('model_type')
  if kind not in FAMILIES:
    known = ', '.join(map(repr, FAMILIES))
    raise BaseModelError(
      f'model_type {kind!r} is not supported; this version trains {known}'
    )
  family = FAMILIES[kind]
  fields = {**family.defaults, **fields}
  _refuse_others(fields, family)
  try:
    return _read(kind, family, fields)
  except KeyError as error:
    raise BaseModelError(
      f'config.json has no field {error.args[0]!r}, which a {kind} model needs'
    ) from error


def _refuse_others(fields: Mapping[str, Any], family: Family) -> None:
  """Refuses what would need other arithmetic."""
  for field, value in fields.items():
    if field in family.needs and value not in family.needs[field]:
      raise BaseModelError(
        f'config.json has {field}={value!r}, which this decoder does not'
        f' compute; it needs {family.needs[field][0]!r}'
      )
    # Names with an underscore or a dot in front are notes of other programs.
    unknown = field not in _KNOWN and not field.startswith(
      ('_', 'transformers.')
    )
    if unknown and field not in family.needs and value:
      raise BaseModelError(
        f'config.json has {field}={value!r}, which jlora does not know; if the'
        ' model computes the same without it, take it out of the file'
      )


def _read(
  kind: str, family: Family, fields: Mapping[str, Any]
) -> DecoderConfig:
  heads, layers = fields['num_attention_heads'], fields['num_hidden_layers']
  rope = fields.get('rope_parameters') or fields.get('rope_scaling') or {}
  theta = rope.get('rope_theta', fields.get('rope_theta', 10000.0))
  longest = fields.get('max_position_embeddings', 2048)
  window = _window(family, fields)
  unrotated = _unrotated(fields, layers) if family.skips_rope else ()
  local = _local_layers(family, fields, unrotated) if window else ()
  biases = [*family.biases]
  for field, names in family.bias_fields.items():
    biases += names if fields.get(field) else ()
  return DecoderConfig(
    family=kind,
    **{ours: fields[theirs] for ours, theirs in _SIZES.items()},
    kv_heads=fields.get('num_key_value_heads') or heads,
    head_dim=fields.get('head_dim') or fields['hidden_size'] // heads,
    max_positions=longest,
    rope_theta=float(theta),
    rope_scaling=_read_scaling(rope, longest),
    norm_eps=fields.get('rms_norm_eps', 1e-6),
    tie_embeddings=bool(fields.get('tie_word_embeddings', False)),
    biases=tuple(biases),
    qk_norm=family.qk_norm,
    sliding_window=window if local else None,
    local_layers=local,
    unrotated_layers=unrotated,
  )


def _window(family: Family, fields: Mapping[str, Any]) -> int | None:
  """Returns how many tokens a local layer sees; None if none is local."""
  if family.window is None:
    return None
  if family.window == 'switched' and not fields.get('use_sliding_window'):
    return None
  window = fields.get('sliding_window')
  if window is not None and not (type(window) is int and window > 0):
    raise BaseModelError(
      f'config.json has sliding_window={window!r}, which must be a positive'
      ' whole number or null'
    )
  return window


def _local_layers(
  family: Family, fields: Mapping[str, Any], unrotated: tuple[int, ...]
) -> tuple[int, ...]:
  """Returns the layers that see a window, where there is one."""
  layers = range(fields['num_hidden_layers'])
  if family.window == 'all':
    return tuple(layers)
  kinds = fields.get('layer_types')
  if kinds is None:
    first = fields.get('max_window_layers', 0)
    return unrotated if family.skips_rope else tuple(layers[first:])
  _check_length('layer_types', kinds, len(layers))
  if others := set(kinds) - {_WHOLE, _WINDOW}:
    raise BaseModelError(
      f'config.json has layer_types with {sorted(others)}, which this decoder'
      f' does not compute; it knows {_WHOLE!r} and {_WINDOW!r}'
    )
  return tuple(i for i in layers if kinds[i] == _WINDOW)


def _unrotated(fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
  """Returns the layers without rotary embeddings."""
  flags = fields.get('no_rope_layers')
  if flags is None:
    every = fields['no_rope_layer_interval']
    if type(every) is not int or every < 1:
      raise BaseModelError(
        f'config.json has no_rope_layer_interval={every!r}, which must be a'
        ' positive whole number'
      )
    return tuple(range(every - 1, layers, every))
  _check_length('no_rope_layers', flags, layers)
  return tuple(i for i in range(layers) if not flags[i])


def _check_length(field: str, values: Sequence[Any], layers: int) -> None:
  if not isinstance(values, list | tuple) or len(values) != layers:
    raise BaseModelError(
      f'config.json has {field}={values!r}, which must be a list of'
      f' {layers}, one for each layer'
    )


def _read_scaling(rope: Mapping[str, Any], longest: int) -> RopeScaling | None:
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return None
  if kind not in rope_scaling.KINDS:
    known = ', '.join(map(repr, ['default', *rope_scaling.KINDS]))
    raise BaseModelError(
      f'rope_type {kind!r} is not supported; jlora knows {known}'
    )
  make = rope_scaling.KINDS[kind]
  values = {}
  for field in dataclasses.fields(make):
    if field.name == 'max_positions':
      values[field.name] = longest
      continue
    key = _ROPE.get(field.name, field.name)
    # Llama 3's have no default in transformers; the others' are ours too.
    needed = field.default is dataclasses.MISSING or kind == 'llama3'
    if needed or rope.get(key) is not None:
      values[field.name] = rope[key]
      if not isinstance(rope[key], int | float) or not math.isfinite(rope[key]):
        raise BaseModelError(
          f'config.json has {key}={rope[key]!r} in its rope parameters, which'
          ' must be a number'
        )
  return make(**values)


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """Returns the fields of a config.json that `transformers` loads."""
  family = FAMILIES[config.family]
  fields = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
  fields |= {
    'architectures': [family.architecture],
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': config.max_positions,
    'model_type': config.family,
    'num_key_value_heads': config.kv_heads,
    'rms_norm_eps': config.norm_eps,
    'rope_parameters': _write_rope(config),
    'tie_word_embeddings': config.tie_embeddings,
  }
  for field, names in family.bias_fields.items():
    fields[field] = set(names) <= set(config.biases)
  if family.window:
    fields['sliding_window'] = config.sliding_window
  if family.window == 'switched':
    fields['use_sliding_window'] = config.sliding_window is not None
    fields['layer_types'] = [
      _WINDOW if i in config.local_layers else _WHOLE
      for i in range(config.layers)
    ]
  if family.skips_rope:
    fields['no_rope_layers'] = [
      int(i not in config.unrotated_layers) for i in range(config.layers)
    ]
  return dict(sorted(fields.items()))


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
  scaling = config.rope_scaling
  kind = 'default' if scaling is None else scaling.KIND
  rope = {'rope_type': kind, 'rope_theta': config.rope_theta}
  for name, value in dataclasses.asdict(scaling).items() if scaling else ():
    if name != 'max_positions' and value is not None:
      rope[_ROPE.get(name, name)] = value
  return rope
