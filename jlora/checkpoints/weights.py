"""Weights on their way from a file to a decoder's tree, one leaf at a time."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jlora.core.tree import nest
from jlora.errors import BaseModelError
from jlora.models import layout
from jlora.models.config import DecoderConfig

Index = tuple[slice, ...]  # one slice an axis, of step 1
_SIZES = {
  'vocab_size': 1 << 24,
  'hidden_size': 1 << 20,
  'intermediate_size': 1 << 24,
  'moe_intermediate_size': 1 << 24,
  'n_inner': 1 << 24,
  'num_local_experts': 1 << 16,
  'num_experts_per_tok': 1 << 16,
  'num_hidden_layers': 1 << 16,
  'num_attention_heads': 1 << 16,
  'num_key_value_heads': 1 << 16,
  'head_dim': 1 << 16,
  'max_position_embeddings': 1 << 31,
}  # field of config.json -> the largest that is believed
_SHOWN = 5  # names listed in a message
_PART = 1 << 16  # values that are checked or rounded at once


class Source(Protocol):
  """A model's files, seen with Hugging Face's names and layout."""

  config: DecoderConfig

  def read(
    self, name: str, dtype: np.dtype | type, index: Index | None = None
  ) -> np.ndarray:
    """Returns a tensor by Hugging Face's name and in its layout.

    Nothing but what `index` names is kept; None is all of it.
    """


class StoredLeaf:
  """A leaf of the parameters that is still in its file.

  Attributes:
    path: The leaf's path.
    shape: Its shape, the axis over layers included.
    stacked: Whether it has that axis.
    dtype: What its values are rounded to as they are read.
  """

  def __init__(self, source: Source, weight: layout.Weight, dtype: Any):
    """Takes the leaf's place in a source; nothing is read.

    Args:
      source: Where the weights are.
      weight: The leaf's names.
      dtype: What its values are rounded to.
    """
    self.path = weight.path
    self.shape = weight.shape
    self.stacked = weight.stacked
    self.dtype = np.dtype(dtype)
    self._source = source
    self._weight = weight

  def rounded(self, dtype: Any) -> 'StoredLeaf':
    """Returns the same leaf with another dtype."""
    return StoredLeaf(self._source, self._weight, dtype)

  def layers(self, index: Index | None = None) -> Iterator[np.ndarray]:
    """Yields a part of each layer, or of the one array that is not stacked.

    Args:
      index: One slice for each axis of the leaf, layers included; None is the
        whole leaf. Nothing else is kept.

    Raises:
      BaseModelError: A value is NaN or infinite.
    """
    index = index or (slice(None),) * len(self.shape)
    depth = len(self._weight.stack)
    tensors = np.reshape(self._weight.tensors, self._weight.stack or (1,))
    for names in tensors[index[:depth]]:
      parts = [self._read(name, index[depth:]) for name in np.ravel(names)]
      # The experts of a layer come together; one tensor comes as it is.
      yield np.stack(parts) if depth > 1 else parts[0]

  def read(self, index: Index | None = None) -> np.ndarray:
    """Returns a part of the leaf as one array.

    Args:
      index: As in `layers`.

    Raises:
      BaseModelError: A value is NaN or infinite.
    """
    if not self.stacked:
      return next(self.layers(index))
    wanted = range(self.shape[0])
    count = len(wanted[index[0]]) if index else len(wanted)
    leaf = None
    for i, layer in enumerate(self.layers(index)):
      if leaf is None:
        leaf = np.empty((count, *layer.shape), self.dtype)
      leaf[i] = layer
    return leaf

  def __getitem__(self, place: int | tuple[int, ...]) -> np.ndarray:
    """Reads one layer, or an expert of it."""
    place = place if isinstance(place, tuple) else (place,)
    index = [slice(i, i + 1) for i in place]
    index += [slice(None)] * (len(self.shape) - len(place))
    return self.read(tuple(index)).reshape(self.shape[len(place) :])

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """Reads the whole leaf."""
    del copy
    return self.read().astype(dtype or self.dtype, copy=False)

  def _read(self, name: str, index: Index) -> np.ndarray:
    transposed = self._weight.transposed
    stored = index[::-1] if transposed else index
    tensor = self._source.read(name, self.dtype, stored)
    if bad := sum(np.count_nonzero(~np.isfinite(x)) for x in parts_of(tensor)):
      raise BaseModelError(
        f'{name} holds {bad} values that are NaN or infinite as'
        f' {self.dtype}; the file is damaged, or the dtype too narrow'
      )
    return tensor.T if transposed else tensor


def parts_of(tensor: np.ndarray) -> list[np.ndarray]:
  """Returns views of a tensor's rows, each small beside a large tensor."""
  count = min(-(-tensor.size // _PART), len(tensor)) if tensor.ndim else 1
  return np.array_split(tensor, count) if count > 1 else [tensor]


Place = Callable[[str, StoredLeaf], Any]


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes that Hugging Face stores, by name."""
  shapes = {}
  for weight in layout.weights(config):
    shape = weight.shape[len(weight.stack) :]
    shape = shape[::-1] if weight.transposed else shape
    shapes.update(dict.fromkeys(weight.tensors, shape))
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
  experts = fields.get('num_local_experts')
  if experts and not 1 <= (fields.get('num_experts_per_tok') or 0) <= experts:
    raise BaseModelError(
      f'{where} has num_experts_per_tok={fields.get("num_experts_per_tok")!r},'
      f' which must be from 1 to the number of experts, {experts}'
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
    place: Called with each leaf's path and the leaf, which it reads as far as
      it wants; what it returns goes into the tree. None reads all.

  Returns:
    The nested dict that `jlora.models.decoder` describes.

  Raises:
    BaseModelError: A value is NaN or infinite.
  """
  leaves = {}
  for weight in layout.weights(source.config):
    leaf = StoredLeaf(source, weight, dtype)
    leaves[weight.path] = place(weight.path, leaf) if place else leaf.read()
  return nest(leaves)
