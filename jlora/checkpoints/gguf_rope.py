"""Stretches of the rotary wavelengths in GGUF files.

Linear and YaRN's are said by keys. Llama 3's is a tensor of divisors, one for
each rotary pair, and Phi's are two of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.architectures import Architecture
from jlora.checkpoints.gguf_values import STRETCH
from jlora.errors import BaseModelError
from jlora.models import rotary
from jlora.models.config import DecoderConfig
from jlora.models.rope_scaling import (
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  RopeScaling,
  YarnScaling,
)

Factors = dict[str, np.ndarray]  # tensors of divisors, by name

_LLAMA3 = 'rope_freqs.weight'
_LONG = ('rope_factors_short.weight', 'rope_factors_long.weight')
_PREFIX = 'rope.scaling.'
_CONTEXT = _PREFIX + 'original_context_length'
_AMPLITUDE = _PREFIX + 'attn_factor'
# Field of a stretch -> its key.
_KEYS = {
  'factor': _PREFIX + 'factor',
  'original_max_positions': _CONTEXT,
  'beta_fast': _PREFIX + 'yarn_beta_fast',
  'beta_slow': _PREFIX + 'yarn_beta_slow',
}
_KINDS = {'linear': LinearScaling, 'yarn': YarnScaling}
# Keys that would change what is computed, with the values that do not.
_NEUTRAL = {
  'rope.scale_linear': 1,
  _AMPLITUDE: 1,
  _PREFIX + 'yarn_attn_factor': 1,
  _PREFIX + 'yarn_log_multiplier': 0,
}


def factor_names(architecture: Architecture) -> tuple[str, ...]:
  """Returns the tensors that may say a stretch."""
  llama = (_LLAMA3,) if architecture.factors else ()
  return llama + (_LONG if architecture.part_rotated else ())


def read_stretch(
  where: Any,
  config: DecoderConfig,
  values: Mapping[str, Any],
  factors: Factors,
) -> RopeScaling | None:
  """Reads how the wavelengths are stretched.

  Args:
    where: The file, for messages.
    config: The decoder without a stretch.
    values: Of the metadata, by key behind the architecture's name.
    factors: Those of `factor_names` that the file has.

  Raises:
    BaseModelError: The wavelengths are stretched in a way that is not known.
  """
  if _LLAMA3 in factors:
    return _read_llama3(where, config, values, factors[_LLAMA3])
  if factors.keys() >= set(_LONG):
    return _read_long(where, config, values, factors)
  _refuse_others(where, values, _NEUTRAL)
  kind = values.get(STRETCH, 'none')
  if kind == 'none':
    return None
  if kind not in _KINDS:
    raise BaseModelError(
      f'{where} has {STRETCH}={kind!r}, which this decoder does not'
      f' compute; it knows {", ".join(map(repr, ("none", *_KINDS)))}'
    )
  make = _KINDS[kind]
  names = {field.name for field in dataclasses.fields(make)} & _KEYS.keys()
  try:
    return make(**{n: values[_KEYS[n]] for n in names if _KEYS[n] in values})
  except TypeError as error:
    raise BaseModelError(
      f'{where} stretches the rotary wavelengths {kind!r}, but does not say by'
      f' how much: {error}'
    ) from error


def _refuse_others(
  where: Any, values: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  for key, value in wanted.items():
    if (found := values.get(key, value)) != value:
      raise BaseModelError(
        f'{where} has {key}={found!r}, which this decoder does not compute; it'
        f' needs {value!r}'
      )


def _read_llama3(
  where: Any,
  config: DecoderConfig,
  values: Mapping[str, Any],
  divisors: np.ndarray,
) -> Llama3Scaling:
  """Recognizes Llama 3's stretch in its divisors."""
  _refuse_others(where, values, {**_NEUTRAL, STRETCH: 'none'})
  scaling = Llama3Scaling(
    factor=float(str(divisors.max())),
    original_max_positions=values.get(
      _CONTEXT, Llama3Scaling.original_max_positions
    ),
  )
  expected = _divisors(dataclasses.replace(config, rope_scaling=scaling))
  if divisors.shape != expected.shape or not np.allclose(
    divisors, expected, rtol=1e-4, atol=0
  ):
    raise BaseModelError(
      f'{where} stretches the rotary wavelengths by other factors than'
      " Llama 3's; load the model from its Hugging Face folder instead"
    )
  return scaling


def _divisors(config: DecoderConfig) -> np.ndarray:
  plain = dataclasses.replace(config, rope_scaling=None)
  return rotary.frequencies(plain) / rotary.frequencies(config)


def _read_long(
  where: Any,
  config: DecoderConfig,
  values: Mapping[str, Any],
  factors: Factors,
) -> LongScaling:
  pairs = len(rotary.frequencies(config))
  for name in _LONG:
    divisors = factors[name]
    if divisors.shape != (pairs,) or not np.all(
      (divisors > 0) & (divisors < np.inf)
    ):
      raise BaseModelError(
        f'{where} has a tensor {name} that is not {pairs} positive numbers'
      )
  short, long = (tuple(float(str(x)) for x in factors[name]) for name in _LONG)
  scaling = LongScaling(
    short_factor=short,
    long_factor=long,
    original_max_positions=values.get(_CONTEXT, config.max_positions),
    max_positions=config.max_positions,
  )
  amplitude = values.get(_AMPLITUDE, 1.0)
  if np.isclose(amplitude, scaling.amplitude, rtol=1e-6):
    return scaling
  return dataclasses.replace(scaling, attention_factor=amplitude)


def write_stretch(
  config: DecoderConfig, architecture: Architecture
) -> tuple[dict[str, Any], Factors]:
  """Returns the keys and the tensors from which a stretch is read.

  Args:
    config: The decoder's.
    architecture: The file's.
  """
  scaling = config.rope_scaling
  if isinstance(scaling, Llama3Scaling) and architecture.factors:
    context = scaling.original_max_positions
    return {_CONTEXT: context}, {_LLAMA3: _divisors(config)}
  if isinstance(scaling, LongScaling) and architecture.part_rotated:
    stretch = (scaling.short_factor, scaling.long_factor)
    keys = {
      _CONTEXT: scaling.original_max_positions,
      _AMPLITUDE: scaling.amplitude,
    }
    arrays = (np.asarray(factor, np.float32) for factor in stretch)
    return keys, dict(zip(_LONG, arrays, strict=True))
  if type(scaling) not in _KINDS.values():
    return {}, {}
  keys = {STRETCH: scaling.KIND}
  for name, value in dataclasses.asdict(scaling).items():
    if name in _KEYS:
      whole = name == 'original_max_positions'
      keys[_KEYS[name]] = value if whole else float(value)
  return keys, {}
