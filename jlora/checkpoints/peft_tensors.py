"""PEFT's adapter_model.safetensors, which holds what is expected, no more."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from jlora.errors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = ('BF16', 'F16', 'F32')

# Part of a key -> what it is part of; the first that occurs.
_VARIANTS = {
  'lora_magnitude_vector': 'part of DoRA, for which use_dora is not set',
  'lora_embedding_': 'part of a low-rank pair that target_modules leaves out',
  'trainable_tokens_delta': 'rows that trainable_token_indices leaves out',
  'lora_B.bias': 'a bias of a low-rank pair (lora_bias), which is not read',
  '.bias': 'a trained bias, which is not read',
  'base_layer.': 'part of the base (see save_embedding_layers of PEFT)',
}


def load_tensors(
  path: pathlib.Path,
  shapes: Shapes,
  optional: Shapes,
  names: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
  """Reads a file that must hold the tensors named, and no others.

  Keys, shapes and dtypes are checked before any tensor is read.

  Args:
    path: The safetensors file.
    shapes: The shape of every key.
    optional: Shapes of keys that may be there too.
    names: Keys that stand for others, which they may have in their place.

  Returns:
    float32 arrays by key; 16-bit floats are widened.

  Raises:
    AdapterError: The file is damaged, or a key, shape, dtype or value is not
      as it must be.
  """
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      stored = _stored_keys(path, names or {})
      found = _check_keys(path, stored, shapes, optional)
      for key, shape in found.items():
        _check_slice(path, key, file.get_slice(stored[key]), shape)
      tensors = {
        key: file.get_tensor(stored[key]).astype(np.float32) for key in found
      }
  except (safetensors.SafetensorError, OSError) as error:
    raise AdapterError(
      f'{path} is no whole safetensors file: {error}'
    ) from error
  for key, tensor in tensors.items():
    check_finite(f'{path}: {key}', tensor)
  return tensors


def check_finite(name: str, tensor: np.ndarray) -> None:
  """Checks that every value of a tensor is a number.

  Args:
    name: What the message calls the tensor.
    tensor: Of any shape.

  Raises:
    AdapterError: A value is NaN or infinite.
  """
  bad = tensor.size - np.count_nonzero(np.isfinite(tensor))
  if bad:
    raise AdapterError(
      f'{name} has {bad} of {tensor.size} values NaN or infinite; every value'
      ' of an adapter must be finite'
    )


def _stored_keys(
  path: pathlib.Path, names: Mapping[str, str]
) -> dict[str, str]:
  """Returns the keys of the file by those that they stand for."""
  stored: dict[str, str] = {}
  for key in _header_keys(path):
    meant = names.get(key, key)
    if meant in stored:
      raise AdapterError(f'{path} holds the key {key!r} more than once')
    stored[meant] = key
  return stored


def _check_keys(
  path: pathlib.Path,
  found: Mapping[str, str],
  shapes: Shapes,
  optional: Shapes,
) -> dict[str, tuple[int, ...]]:
  """Returns the shape that every key of the file must have."""
  extra = sorted(set(found) - shapes.keys() - optional.keys())
  if extra:
    raise AdapterError(
      f'{path} holds {extra[0]!r}{_more(extra)}, {_what_is(extra[0])}'
    )
  missing = sorted(shapes.keys() - set(found))
  if missing:
    raise AdapterError(
      f'{path} lacks {missing[0]!r}{_more(missing)} of shape'
      f' {shapes[missing[0]]}, which adapter_config.json asks for'
    )
  every = {**shapes, **optional}
  return {key: every[key] for key in found}


def _header_keys(path: pathlib.Path) -> list[str]:
  """Returns the keys as written: `safetensors` hides a repeated one."""
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    pairs = json.loads(file.read(size), object_pairs_hook=list)
  return [key for key, _ in pairs if key != '__metadata__']


def _more(keys: list[str]) -> str:
  return f' and {len(keys) - 1} more' if len(keys) > 1 else ''


def _what_is(key: str) -> str:
  for part, variant in _VARIANTS.items():
    if part in key:
      return variant
  return (
    'which is no tensor of this base or is not named by target_modules or'
    ' modules_to_save in adapter_config.json'
  )


def _check_slice(
  path: pathlib.Path, key: str, tensor: Any, shape: tuple[int, ...]
) -> None:
  found = tuple(tensor.get_shape())
  if found != shape:
    raise AdapterError(
      f'{path}: {key} has shape {found}; base and rank need {shape}'
    )
  if tensor.get_dtype() not in _DTYPES:
    raise AdapterError(
      f'{path}: {key} has dtype {tensor.get_dtype()}; it must be one of'
      f' {", ".join(_DTYPES)}'
    )
