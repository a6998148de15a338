"""A decoder's sizes in the metadata of a GGUF file, read and written."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.architectures import (
  ARCHITECTURES,
  Architecture,
  architecture_of,
)
from jlora.checkpoints.gguf_rope import (
  Factors,
  factor_names,
  read_stretch,
  write_stretch,
)
from jlora.checkpoints.gguf_values import PATTERN, read_name, read_values
from jlora.checkpoints.weights import check_sizes
from jlora.errors import BaseModelError, ConfigError
from jlora.models.config import DecoderConfig
from jlora.models.families import FAMILIES

Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDING, _HEAD = 'token_embd.weight', 'output.weight'
_ROTATED = 'rope.dimension_count'
_VALUES = 'attention.value_length'
_EXPERTS = 'expert_count'
_WINDOW = 'attention.sliding_window'
# Field of config.json whose size is checked -> field of DecoderConfig.
_CHECKED = {
  'head_dim': 'head_dim',
  'hidden_size': 'embed_dim',
  'intermediate_size': 'mlp_dim',
  'max_position_embeddings': 'max_positions',
  'num_attention_heads': 'heads',
  'num_experts_per_tok': 'experts_per_token',
  'num_hidden_layers': 'layers',
  'num_key_value_heads': 'kv_heads',
  'num_local_experts': 'experts',
  'rms_norm_eps': 'norm_eps',
  'rope_theta': 'rope_theta',
  'vocab_size': 'vocab_size',
}
# Linear layers that add a bias if a tensor of the first layer is there.
_BIASES = {
  'blk.0.attn_output.bias': ('q_proj', 'k_proj', 'v_proj', 'o_proj'),
  'blk.0.ffn_down.bias': ('gate_proj', 'up_proj', 'down_proj'),
}


def read_metadata(
  where: Any,
  metadata: Mapping[str, Any],
  shapes: Shapes,
  factors: Factors | None = None,
) -> DecoderConfig:
  """Reads what a model is from the metadata of its GGUF file.

  Args:
    where: The file, for messages.
    metadata: Values by key.
    shapes: Of the tensors, by llama.cpp's names.
    factors: Those of `factor_names` that the file has.

  Raises:
    BaseModelError: The architecture is not known, or uses a feature that this
      decoder does not compute; the key is named.
  """
  name = read_name(where, metadata)
  architecture = ARCHITECTURES[name]
  if _EMBEDDING not in shapes:
    raise BaseModelError(f'{where} lacks the tensor {_EMBEDDING!r}')
  values = read_values(where, metadata)
  fields = _read_fields(where, name, values)
  fields['vocab_size'] = shapes[_EMBEDDING][0]
  sizes = {theirs: fields.get(ours) for theirs, ours in _CHECKED.items()}
  sizes = {field: size for field, size in sizes.items() if size is not None}
  check_sizes(where, sizes, len(shapes))
  fields = _filled(fields, architecture)
  _check_features(where, name, values, fields)
  config = DecoderConfig(
    **fields,
    **_layers(values, fields, architecture),
    tie_embeddings=_HEAD not in shapes,
    biases=_biases(fields['family'], shapes, architecture),
    rotary_share=values.get(_ROTATED, fields['head_dim']) / fields['head_dim'],
  )
  scaling = read_stretch(where, config, values, factors or {})
  return dataclasses.replace(config, rope_scaling=scaling)


def stretch_tensors(where: Any, metadata: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names of tensors that are no weights, but say a stretch."""
  return factor_names(ARCHITECTURES[read_name(where, metadata)])


def _read_fields(
  where: Any, name: str, values: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of DecoderConfig that keys or the family say."""
  architecture = ARCHITECTURES[name]
  found = {
    field: values[key]
    for field, key in architecture.keys.items()
    if values.get(key)
  }
  needed = ['layers', 'embed_dim', 'heads', 'mlp_dim', 'norm_eps']
  needed += ['experts_per_token'] if 'experts' in found else []
  for field in needed:
    key = architecture.keys[field]
    if key not in values:
      raise BaseModelError(f'{where} lacks the key {name}.{key}')
    found[field] = values[key]
  family = architecture.families[0]
  if 'experts' in found and architecture.with_experts:
    family = architecture.with_experts
  traits = {k: v for k, v in FAMILIES[family].traits.items() if k != 'biases'}
  return {'family': family, **architecture.defaults, **traits, **found}


def _filled(
  fields: Mapping[str, Any], architecture: Architecture
) -> dict[str, Any]:
  """Returns fields of which each has a value, as llama.cpp fills them in."""
  width = fields['embed_dim'] // fields['heads']
  filled = {'kv_heads': fields['heads'], 'head_dim': width, **fields}
  if architecture.wide is not None:
    wide = filled['layers'] == architecture.wide
    filled['query_scalar'] = width if wide else filled['head_dim']
  return filled


def _check_features(
  where: Any, name: str, values: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
  architecture, head_dim = ARCHITECTURES[name], fields['head_dim']
  wanted = {_VALUES: head_dim, 'expert_gating_func': 1}
  if not architecture.part_rotated:
    wanted[_ROTATED] = head_dim
  if 'experts' not in architecture.keys:
    wanted[_EXPERTS] = 0
  rotated = values.get(_ROTATED, head_dim)
  if rotated > head_dim or rotated % 2 or not rotated:
    wanted[_ROTATED] = head_dim
  for key, value in wanted.items():
    if (found := values.get(key, value)) != value:
      raise BaseModelError(
        f'{where} has {name}.{key}={found!r}, which this decoder does not'
        f' compute; it needs {value!r}'
      )
  if architecture.window is None and values.get(_WINDOW):
    warnings.warn(
      f'{where} has {name}.{_WINDOW}={values[_WINDOW]}, which llama.cpp does'
      ' not compute in this architecture; every layer sees the whole text',
      stacklevel=4,
    )


def _layers(
  values: Mapping[str, Any],
  fields: Mapping[str, Any],
  architecture: Architecture,
) -> dict[str, tuple[int, ...]]:
  """Returns which layers see a window, and which have no rotary embeddings."""
  layers, every = range(fields['layers']), architecture.skips_rope
  unrotated = tuple(layers[every - 1 :: every]) if every else ()
  local: tuple[int, ...] = ()
  if fields.get('sliding_window'):
    period = values.get(PATTERN, architecture.window)
    if isinstance(period, np.ndarray):  # says it of each layer
      local = tuple(np.flatnonzero(period[: len(layers)]).tolist())
    elif period == 'all':
      local = tuple(layers)
    else:
      local = _local(len(layers), period)
  return {'local_layers': local, 'unrotated_layers': unrotated}


def _local(layers: int, period: int) -> tuple[int, ...]:
  """Returns all layers but every `period`-th."""
  return tuple(i for i in range(layers) if (i + 1) % period)


def _biases(
  family: str, shapes: Shapes, architecture: Architecture
) -> tuple[str, ...]:
  found = [*FAMILIES[family].traits.get('biases', ())]
  for tensor, layers in _BIASES.items() if architecture.biased else ():
    found += layers if tensor in shapes else ()
  return tuple(found)


def write_metadata(
  config: DecoderConfig, shapes: Shapes
) -> tuple[dict[str, Any], Factors]:
  """Returns what llama.cpp computes the same model from.

  Args:
    config: The decoder's, whose family has an architecture.
    shapes: Of the weights, by llama.cpp's names.

  Returns:
    The metadata, and tensors that say how wavelengths are stretched.

  Raises:
    ConfigError: The decoder has a feature that GGUF cannot express; it is
      named.
  """
  name = architecture_of(config.family)
  architecture = ARCHITECTURES[name]
  values = {
    key: getattr(config, field) for field, key in architecture.keys.items()
  }
  # An expert's width stands where the others have theirs, too.
  values['feed_forward_length'] = config.mlp_dim
  values[_VALUES] = config.head_dim
  values['vocab_size'] = config.vocab_size
  if 'rope_theta' in architecture.keys:
    values[_ROTATED] = int(config.head_dim * config.rotary_share)
  if config.sliding_window and isinstance(architecture.window, int):
    periods = (architecture.window, *range(1, config.layers + 2))
    fit = (
      p for p in periods if _local(config.layers, p) == config.local_layers
    )
    values[PATTERN] = next(fit, architecture.window)
  keys, factors = write_stretch(config, architecture)
  values = {key: value for key, value in (values | keys).items() if value}
  if architecture.window == 'all':
    values.setdefault(_WINDOW, 0)  # without it, Phi-4 was taken for Phi-3
    _warn_of_window(config)
  metadata = {'general.architecture': name}
  metadata |= {f'{name}.{key}': value for key, value in values.items()}
  _check_expressed(config, metadata, shapes, factors)
  return metadata, factors


def _warn_of_window(config: DecoderConfig) -> None:
  if config.sliding_window:
    warnings.warn(
      f'llama.cpp leaves out the window of {config.sliding_window} tokens in'
      f' {config.family} models, and computes otherwise for longer texts',
      stacklevel=4,
    )


def _check_expressed(
  config: DecoderConfig,
  metadata: Mapping[str, Any],
  shapes: Shapes,
  factors: Factors,
) -> None:
  """Refuses a decoder that is not what would be read again."""
  rounded = {
    key: float(np.float32(value)) if isinstance(value, float) else value
    for key, value in metadata.items()
  }
  try:
    found = read_metadata('the file', rounded, shapes, factors)
  except BaseModelError as error:
    raise ConfigError(
      f'the model cannot be written as GGUF: {error}'
    ) from error
  found = dataclasses.replace(found, family=config.family)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value != getattr(found, field.name):
      raise ConfigError(
        f'the model has {field.name}={value!r}, which GGUF files of the'
        f' architecture {metadata["general.architecture"]!r} cannot express'
      )
