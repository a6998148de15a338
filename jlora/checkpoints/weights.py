"""Weights on their way from a file to a decoder's tree, one leaf at a time."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np

from jlora.core.tree import nest
from jlora.errors import BaseModelError
from jlora.models import families
from jlora.models.config import DecoderConfig

Place = Callable[[str, np.ndarray], Any]
_SIZES = {
  'vocab_size': 1 << 24,
  'hidden_size': 1 << 20,
  'intermediate_size': 1 << 24,
  'num_hidden_layers': 1 << 16,
  'num_attention_heads': 1 << 16,
  'num_key_value_heads': 1 << 16,
  'head_dim': 1 << 16,
  'max_position_embeddings': 1 << 31,
}  # field of config.json -> the largest that is believed
_SHOWN = 5  # names listed in a message


class Source(Protocol):
  """A model's files, seen with Hugging Face's names and layout."""

  config: DecoderConfig

  def read(self, module: str, dtype: np.dtype | type) -> np.ndarray:
    """Returns the weight of `module`, `[out, in]` for a linear layer."""


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape that Hugging Face stores, by module path."""
  shapes = {}
  for weight in families.weights(config):
    shape = weight.shape[1:] if weight.stacked else weight.shape
    shape = shape[::-1] if weight.transposed else shape
    shapes.update(dict.fromkeys(weight.modules, shape))
  return shapes


def check_sizes(where: Any, fields: Mapping[str, Any], tensors: int) -> None:
  """Checks the numbers of a config before anything is built from them.

  Args:
    where: The file they come from, for the message.
    fields: As in config.json.
    tensors: How many the files hold; a layer has one at least.

  Raises:
    BaseModelError: A number is not of a size that a model can have.
  """
  for field, largest in _SIZES.items():
    largest = min(largest, tensors) if field == 'num_hidden_layers' else largest
    value = fields.get(field)
    if value is not None and not (type(value) is int and 1 <= value <= largest):
      raise BaseModelError(
        f'{where} has {field}={value!r}, which must be a whole number from 1'
        f' to {largest}'
      )
  for field in ('rms_norm_eps', 'rope_theta'):
    value = fields.get(field, 1.0)
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise BaseModelError(
        f'{where} has {field}={value!r}, which must be a positive number'
      )
  heads = fields.get('num_attention_heads') or 1
  if heads % (fields.get('num_key_value_heads') or 1):
    raise BaseModelError(
      f'{where} has {heads} heads, which'
      f' {fields["num_key_value_heads"]} key-value heads do not divide'
    )


def check_tensors(
  where: Any,
  found: Mapping[str, tuple[int, ...]],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """Checks that a file holds exactly the tensors that a model needs.

  Args:
    where: The file or folder, for the message.
    found: Shapes by name.
    wanted: Shapes by name.

  Raises:
    BaseModelError: Some are missing, too many or of another shape.
  """
  if missing := wanted.keys() - found.keys():
    raise BaseModelError(
      f'{where} lacks {listed(missing)}; the file is incomplete, or its'
      ' configuration is that of another model'
    )
  if extra := found.keys() - wanted.keys():
    raise BaseModelError(
      f'{where} holds {listed(extra)}, which this decoder does not compute'
      ' with; it is a model of another kind'
    )
  for name, shape in wanted.items():
    if tuple(found[name]) != shape:
      raise BaseModelError(
        f'{where}: {name} has shape {tuple(found[name])}, but the model'
        f' configuration asks for {shape}'
      )


def listed(names: Collection[str]) -> str:
  """Returns the first names in quotes, and how many more there are."""
  text = ', '.join(map(repr, sorted(names)[:_SHOWN]))
  more = len(names) - _SHOWN
  return f'{text} and {more} more' if more > 0 else text


def load_params(
  source: Source,
  dtype: np.dtype | type = np.float32,
  *,
  place: Place | None = None,
) -> dict[str, Any]:
  """Reads a decoder's parameters, leaf by leaf.

  Args:
    source: Where the weights are.
    dtype: What they are rounded to.
    place: Called with each leaf's path and array; what it returns goes into
      the tree. The array is dropped before the next leaf is read, so with a
      `place` that quantizes, the host never holds more than the largest leaf
      beside what is kept.

  Returns:
    The nested dict that `jlora.models.decoder` describes.

  Raises:
    BaseModelError: A value is NaN or infinite.
  """
  leaves = {}
  for weight in families.weights(source.config):
    leaf = _read_leaf(source, weight, np.dtype(dtype))
    leaf = leaf if place is None else place(weight.path, leaf)
    leaves[weight.path] = leaf
  return nest(leaves)


def _read_leaf(
  source: Source, weight: families.Weight, dtype: np.dtype
) -> np.ndarray:
  if not weight.stacked:
    return _read_one(source, weight.modules[0], weight, dtype)
  leaf = np.empty(weight.shape, dtype)
  for i, module in enumerate(weight.modules):
    leaf[i] = _read_one(source, module, weight, dtype)
  return leaf


def _read_one(
  source: Source, module: str, weight: families.Weight, dtype: np.dtype
) -> np.ndarray:
  tensor = source.read(module, dtype)
  bad = tensor.size - np.count_nonzero(np.isfinite(tensor))
  if bad:
    raise BaseModelError(
      f'{module}.weight holds {bad} values that are NaN or infinite as'
      f' {dtype}; the file is damaged, or the dtype too narrow'
    )
  return tensor.T if weight.transposed else tensor
