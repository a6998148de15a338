"""How llama.cpp names and arranges a model's weights.

Linear layers are [out, in] and the experts of a layer are one tensor. In some
architectures the rows of the query and key projections are permuted so that the
two features of a rotary pair are neighbors. Norms that are stored as their
distance from one elsewhere have it added.

References:
  `llama.cpp <https://github.com/ggml-org/llama.cpp>`_, the converters in
  `conversion/`, and `tensor_mapping.py` of the package `gguf`.
"""

import dataclasses
import functools

import gguf
import numpy as np

from jlora.checkpoints.architectures import ARCHITECTURES, architecture_of
from jlora.models import layout
from jlora.models.config import DecoderConfig

_EXPERTS = 'layers/mlp/experts/'


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor of Hugging Face's is in a GGUF file.

  Attributes:
    tensor: llama.cpp's name of the tensor that holds it.
    expert: Its index in that tensor; None where it is the whole.
    turned: Whether Hugging Face stores it the other way around.
    heads: Whose rows are permuted; 0 for none.
    offset: What has been added.
  """

  tensor: str
  expert: int | None
  turned: bool
  heads: int
  offset: float


class Layout:
  """Where a decoder's weights are in a GGUF file.

  Attributes:
    places: By Hugging Face's names of tensors.
    shapes: Of the tensors in the file, by llama.cpp's names.
  """

  def __init__(self, config: DecoderConfig):
    """Lays out a decoder whose family has an architecture.

    Args:
      config: The decoder's.
    """
    self._config = config
    self._architecture = architecture_of(config.family)
    self.places: dict[str, Place] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for weight in layout.weights(config):
      shape = weight.shape[min(1, len(weight.stack)) :]
      shape = (*shape[:-2], *shape[:-3:-1]) if weight.linear else shape
      for index, name in weight.places():
        place = self._place(weight, index, name)
        self.places[name] = place
        self.shapes[place.tensor] = shape

  def _place(
    self, weight: layout.Weight, index: tuple[int, ...], name: str
  ) -> Place:
    module = name.rpartition('.')[0]
    if weight.path.startswith(_EXPERTS):
      part = weight.path.split('/')[-2]
      module = f'model.layers.{index[0]}.mlp.experts.{part}'
    plus_one = self._config.norm == 'rms_plus_one'
    return Place(
      tensor=f'{self._names.get_name(module)}.{weight.kind}',
      expert=index[1] if len(index) > 1 else None,
      turned=weight.linear and not weight.transposed,
      heads=self._rotary_heads(weight.path),
      offset=float(plus_one and weight.path.endswith('/scale')),
    )

  @functools.cached_property
  def _names(self) -> gguf.TensorNameMap:
    numbers = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(
      numbers[self._architecture], self._config.layers
    )

  def _rotary_heads(self, path: str) -> int:
    """Returns the heads of a weight whose rows are permuted, else 0."""
    if not ARCHITECTURES[self._architecture].permuted:
      return 0
    heads = {'q_proj': self._config.heads, 'k_proj': self._config.kv_heads}
    return heads.get(path.split('/')[-2], 0)

  def tensor(self, weight: layout.Weight, layer: int) -> str:
    """Returns llama.cpp's name of a leaf's tensor in a layer."""
    per_layer = int(np.prod(weight.stack[1:], dtype=int))
    return self.places[weight.tensors[layer * per_layer]].tensor

  def arrange(self, weight: layout.Weight, values: np.ndarray) -> np.ndarray:
    """Returns a layer of a leaf as it is written.

    Args:
      weight: The leaf.
      values: Float32, of one layer with all its experts.
    """
    place = self.places[weight.tensors[0]]
    if weight.linear:
      values = values.swapaxes(-1, -2)
    if place.heads:
      arranged = np.empty_like(values)
      arranged[rotary_rows(len(values), place.heads)] = values
      values = arranged
    return values + np.float32(place.offset) if place.offset else values


def rotary_rows(rows: int, heads: int) -> np.ndarray:
  """Returns where llama.cpp keeps the rows of queries and keys.

  In each of its heads the features i and i + head_dim / 2 of a rotary pair
  lie side by side.

  Args:
    rows: heads * head_dim.
    heads: Query heads for a query projection, else key-value heads.

  Returns:
    int [rows]: the place of each row of Hugging Face's rotate-half order.
  """
  places = np.arange(rows).reshape(heads, -1, 2)
  return places.swapaxes(1, 2).reshape(-1)
