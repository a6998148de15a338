"""Values in a GGUF file's metadata, checked before anything is made of them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.architectures import ARCHITECTURES
from jlora.errors import BaseModelError

PATTERN = 'attention.sliding_window_pattern'
STRETCH = 'rope.scaling.type'

# Beside those that say a field of DecoderConfig. What must not be zero is
# divided by.
_NUMBERS = (
  'attention.sliding_window',
  'attention.value_length',
  'expert_count',
  'rope.dimension_count',
  'rope.scale_linear',
  'rope.scaling.yarn_attn_factor',
  'rope.scaling.yarn_log_multiplier',
)
_WHOLE = ('attention.sliding_window', 'rope.dimension_count')
_POSITIVE = (
  'rope.scaling.attn_factor',
  'rope.scaling.factor',
  'rope.scaling.original_context_length',
  'rope.scaling.yarn_beta_fast',
  'rope.scaling.yarn_beta_slow',
)


def read_name(where: Any, metadata: Mapping[str, Any]) -> str:
  """Returns the architecture's name in ARCHITECTURES.

  Args:
    where: The file, for messages.
    metadata: Values by key.

  Raises:
    BaseModelError: It is another one.
  """
  name = metadata.get('general.architecture')
  if not isinstance(name, str) or name not in ARCHITECTURES:
    known = ', '.join(map(repr, ARCHITECTURES))
    raise BaseModelError(
      f'{where} has the architecture {name!r:.80}; this version reads {known}'
    )
  return name


def read_values(where: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the architecture's values, by key without its name.

  Args:
    where: The file, for messages.
    metadata: Values by key.

  Raises:
    BaseModelError: One that is used is of another type than llama.cpp writes,
      or cannot be right.
  """
  name = read_name(where, metadata)
  values = {
    key.removeprefix(f'{name}.'): _plain(value)
    for key, value in metadata.items()
    if key.startswith(f'{name}.')
  }
  numbers = (*ARCHITECTURES[name].keys.values(), *_NUMBERS, *_POSITIVE)
  for key, value in values.items():
    if key in numbers and not _is_number(value, positive=key in _POSITIVE):
      sign = 'positive' if key in _POSITIVE else 'not negative'
      must = f'be a number that is {sign}'
    elif key in _WHOLE and type(value) is not int:
      must = 'be a whole number'
    elif key == PATTERN and not _is_pattern(value):
      must = 'be a positive whole number, or say it of each layer'
    elif key == STRETCH and not isinstance(value, str):
      must = 'be a word'
    else:
      continue
    raise BaseModelError(
      f'{where} has {name}.{key}={value!r:.80}, which must {must}'
    )
  return values


def _plain(value: Any) -> Any:
  """Returns float32 metadata as the decimal that was rounded to it."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _is_number(value: Any, *, positive: bool) -> bool:
  if type(value) not in (int, float) or not math.isfinite(value):
    return False
  return value > 0 if positive else value >= 0


def _is_pattern(value: Any) -> bool:
  return isinstance(value, np.ndarray) or (type(value) is int and value > 0)
