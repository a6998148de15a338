"""How llama.cpp names and arranges a model's weights.

In some architectures the rows of the query and key projections are permuted so
that the two features of a rotary pair are neighbors.

References:
  `llama.cpp <https://github.com/ggml-org/llama.cpp>`_, the converters in
  `conversion/`, and `tensor_mapping.py` of the package `gguf`.
"""

import dataclasses
import functools

import gguf
import numpy as np

from jlora.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """What the files of one `general.architecture` have in common.

  Attributes:
    families: `model_type`s that are written so; read is the first.
    permuted: Whether rows of queries and keys are.
    biased: Whether linear layers may add a bias where the family's do not
      always.
  """

  families: tuple[str, ...]
  permuted: bool = False
  biased: bool = False


ARCHITECTURES = {
  'llama': Architecture(
    families=('llama', 'mistral'), permuted=True, biased=True
  ),
  'qwen2': Architecture(families=('qwen2',)),
  'qwen3': Architecture(families=('qwen3',)),
  'smollm3': Architecture(families=('smollm3',), permuted=True),
}


def architecture_of(family: str) -> str | None:
  """Returns the name in ARCHITECTURES that a family is written as."""
  for name, architecture in ARCHITECTURES.items():
    if family in architecture.families:
      return name
  return None


class Layout:
  """Where a decoder's weights are in a GGUF file."""

  def __init__(self, config: DecoderConfig):
    """Takes a decoder whose family has an architecture.

    Args:
      config: The decoder's.
    """
    self._config = config
    self._architecture = architecture_of(config.family)

  @functools.cached_property
  def _names(self) -> gguf.TensorNameMap:
    numbers = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(
      numbers[self._architecture], self._config.layers
    )

  def name(self, tensor: str) -> str:
    """Returns llama.cpp's name of a weight.

    Args:
      tensor: Such as `model.layers.3.self_attn.q_proj.weight`.
    """
    return self._names.get_name(tensor, try_suffixes=('.weight', '.bias'))

  def rows(self, tensor: str, count: int) -> np.ndarray | None:
    """Returns where llama.cpp keeps each of a weight's rows.

    Args:
      tensor: As for `name`.
      count: How many rows it has.

    Returns:
      int [count], or None where the rows are in place.
    """
    if not ARCHITECTURES[self._architecture].permuted:
      return None
    module = tensor.rsplit('.', 1)[0]
    if module.endswith('.self_attn.q_proj'):
      return rotary_rows(count, self._config.heads)
    if module.endswith('.self_attn.k_proj'):
      return rotary_rows(count, self._config.kv_heads)
    return None

  def arrange(self, tensor: str, values: np.ndarray) -> np.ndarray:
    """Returns a weight as it is written.

    Args:
      tensor: As for `name`.
      values: As Hugging Face stores it.
    """
    rows = self.rows(tensor, len(values))
    if rows is None:
      return values
    arranged = np.empty_like(values)
    arranged[rows] = values
    return arranged


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
