"""A decoder's sizes in the metadata of a GGUF file, read and written.

What llama.cpp computes is fixed by the architecture's name, by these keys and
by which tensors there are; what none of them says cannot be written.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.gguf_layout import ARCHITECTURES, architecture_of
from jlora.checkpoints.weights import check_sizes
from jlora.errors import BaseModelError, ConfigError
from jlora.models import rotary
from jlora.models.config import DecoderConfig
from jlora.models.hf_config import read_config, write_config
from jlora.models.rope_scaling import Llama3Scaling

Shapes = Mapping[str, tuple[int, ...]]

ROPE_FACTORS = 'rope_freqs.weight'  # divisors of the rotary frequencies
_EMBEDDING, _HEAD = 'token_embd.weight', 'output.weight'
_WINDOW = 'attention.sliding_window'
_CONTEXT = 'rope.scaling.original_context_length'

# GGUF key behind the architecture's name -> field of config.json.
_FIELDS = {
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'block_count': 'num_hidden_layers',
  'context_length': 'max_position_embeddings',
  'embedding_length': 'hidden_size',
  'feed_forward_length': 'intermediate_size',
  'rope.freq_base': 'rope_theta',
}
# Written beside them, and other values refused: key -> field of DecoderConfig.
_REPEATED = {
  'attention.value_length': 'head_dim',
  'rope.dimension_count': 'head_dim',
}
# Likewise of a stretch of the wavelengths: field in `rope_parameters`.
_STRETCH = {
  'rope.scaling.factor': 'factor',
  _CONTEXT: 'original_max_position_embeddings',
  'rope.scaling.yarn_beta_fast': 'beta_fast',
  'rope.scaling.yarn_beta_slow': 'beta_slow',
}
_STRETCHES = ('linear', 'yarn')
# Keys that would change what is computed, with the values that do not.
_NEUTRAL = {
  'expert_count': 0,
  'rope.scale_linear': 1,
  'rope.scaling.attn_factor': 1,
  'rope.scaling.yarn_attn_factor': 1,
}
# Field of config.json -> the tensor of the first layer that says yes to it.
_BIASES = {
  'attention_bias': 'blk.0.attn_output.bias',
  'mlp_bias': 'blk.0.ffn_down.bias',
}


def read_metadata(
  where: Any,
  metadata: Mapping[str, Any],
  shapes: Shapes,
  factors: np.ndarray | None = None,
) -> DecoderConfig:
  """Reads what a model is from the metadata of its GGUF file.

  Args:
    where: The file, for messages.
    metadata: Values by key.
    shapes: Of the tensors, by llama.cpp's names.
    factors: The tensor of that name, ROPE_FACTORS, if there is one.

  Raises:
    BaseModelError: The architecture is not known, or uses a feature that this
      decoder does not compute; the key is named.
  """
  name = metadata.get('general.architecture')
  if name not in ARCHITECTURES:
    known = ', '.join(map(repr, ARCHITECTURES))
    raise BaseModelError(
      f'{where} has the architecture {name!r}; this version reads {known}'
    )
  if _EMBEDDING not in shapes:
    raise BaseModelError(f'{where} lacks the tensor {_EMBEDDING!r}')
  values = {
    key.removeprefix(f'{name}.'): _plain(value)
    for key, value in metadata.items()
    if key.startswith(f'{name}.')
  }
  fields = {_FIELDS[key]: values[key] for key in _FIELDS if key in values}
  fields |= {
    'model_type': ARCHITECTURES[name].families[0],
    'vocab_size': shapes[_EMBEDDING][0],
    'tie_word_embeddings': _HEAD not in shapes,
    'rope_scaling': _read_stretch(where, name, values),
  }
  if ARCHITECTURES[name].biased:
    fields |= {field: tensor in shapes for field, tensor in _BIASES.items()}
  check_sizes(where, fields, len(shapes))
  config = read_config(fields)
  _check_features(where, name, values, config)
  return _with_factors(where, config, values.get(_CONTEXT), factors)


def _plain(value: Any) -> Any:
  """Returns float32 metadata as the decimal that was rounded to it."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_stretch(
  where: Any, name: str, values: Mapping[str, Any]
) -> dict[str, Any] | None:
  kind = values.get('rope.scaling.type', 'none')
  if kind == 'none':
    return None
  if kind not in _STRETCHES:
    raise BaseModelError(
      f'{where} has {name}.rope.scaling.type={kind!r}, which this decoder does'
      f' not compute; it knows {", ".join(map(repr, ("none", *_STRETCHES)))}'
    )
  found = {_STRETCH[key]: values[key] for key in _STRETCH if key in values}
  return {'rope_type': kind, **found}


def _check_features(
  where: Any, name: str, values: Mapping[str, Any], config: DecoderConfig
) -> None:
  wanted = {key: getattr(config, field) for key, field in _REPEATED.items()}
  for key, value in (wanted | _NEUTRAL).items():
    if (found := values.get(key, value)) != value:
      raise BaseModelError(
        f'{where} has {name}.{key}={found!r}, which this decoder does not'
        f' compute; it needs {value!r}'
      )
  if _WINDOW in values:
    warnings.warn(
      f'{where} has {name}.{_WINDOW}={values[_WINDOW]}, which llama.cpp does'
      ' not compute in this architecture; every layer sees the whole text',
      stacklevel=4,
    )


def _with_factors(
  where: Any,
  config: DecoderConfig,
  context: int | None,
  factors: np.ndarray | None,
) -> DecoderConfig:
  """Recognizes Llama 3's stretch in the divisors it was written as."""
  if factors is None:
    return config
  scaling = Llama3Scaling(
    factor=_plain(float(factors.max())),
    original_max_positions=context or Llama3Scaling.original_max_positions,
  )
  scaled = dataclasses.replace(config, rope_scaling=scaling)
  expected = _divisors(scaled)
  if factors.shape != expected.shape or not np.allclose(
    factors, expected, rtol=1e-4, atol=0
  ):
    raise BaseModelError(
      f'{where} stretches the rotary wavelengths by other factors than'
      " Llama 3's; load the model from its Hugging Face folder instead"
    )
  return scaled


def _divisors(config: DecoderConfig) -> np.ndarray:
  plain = dataclasses.replace(config, rope_scaling=None)
  return rotary.frequencies(plain) / rotary.frequencies(config)


def rope_factors(config: DecoderConfig) -> np.ndarray | None:
  """Returns the divisors that a decoder's stretch is written as, if any."""
  if isinstance(config.rope_scaling, Llama3Scaling):
    return _divisors(config)
  return None


def write_metadata(config: DecoderConfig, shapes: Shapes) -> dict[str, Any]:
  """Returns the metadata from which llama.cpp computes the same model.

  Args:
    config: The decoder's.
    shapes: Of the tensors that are written, by llama.cpp's names.

  Raises:
    ConfigError: The decoder has a feature that GGUF cannot express; it is
      named.
  """
  name = architecture_of(config.family)
  if name is None:
    known = ', '.join(f for a in ARCHITECTURES.values() for f in a.families)
    raise ConfigError(
      f'a {config.family} model cannot be written as GGUF; known are {known}'
    )
  fields = write_config(config)
  rope = fields['rope_parameters']
  fields |= {'rope_theta': rope['rope_theta']}
  values = {key: fields[field] for key, field in _FIELDS.items()}
  values |= {key: getattr(config, field) for key, field in _REPEATED.items()}
  values['vocab_size'] = config.vocab_size
  if rope['rope_type'] in _STRETCHES:
    values['rope.scaling.type'] = rope['rope_type']
    values |= {key: rope[f] for key, f in _STRETCH.items() if f in rope}
  elif isinstance(config.rope_scaling, Llama3Scaling):
    values[_CONTEXT] = config.rope_scaling.original_max_positions
  metadata = {'general.architecture': name}
  metadata |= {f'{name}.{key}': value for key, value in values.items()}
  _check_expressed(config, metadata, shapes)
  return metadata


def _check_expressed(
  config: DecoderConfig, metadata: Mapping[str, Any], shapes: Shapes
) -> None:
  """Refuses a decoder that is not what would be read again."""
  rounded = {
    key: float(np.float32(value)) if isinstance(value, float) else value
    for key, value in metadata.items()
  }
  try:
    found = read_metadata('the file', rounded, shapes, rope_factors(config))
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
        f' architecture {metadata["general.architecture"]!r} cannot express;'
        ' write --to=merged instead'
      )
