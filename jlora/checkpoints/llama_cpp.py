"""GGUF files of llama.cpp, seen with Hugging Face's names and layout."""

import collections
import math
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from jlora.checkpoints import tokenizers
from jlora.checkpoints.gguf import GgufFile
from jlora.checkpoints.gguf_config import read_metadata, stretch_tensors
from jlora.checkpoints.gguf_layout import Layout, Place, rotary_rows
from jlora.checkpoints.weights import Index, check_tensors
from jlora.errors import BaseModelError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast


class GgufModel:
  """A model in a GGUF file, with Hugging Face's names and layout.

  Attributes:
    file: The open GGUF file.
    config: The decoder's sizes.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads the header and checks that every tensor is there.

    Args:
      path: A `.gguf` file.

    Raises:
      BaseModelError: The file is damaged, of another architecture, lacks a
        tensor or holds one that this decoder does not compute with.
    """
    self.file = GgufFile(path)
    shapes = {name: info.shape for name, info in self.file.tensors.items()}
    metadata = self.file.metadata
    if (parts := metadata.get('split.count', 1)) != 1:
      raise BaseModelError(
        f'{path} is one of {parts} parts of a model; join them with'
        ' `llama-gguf-split --merge` of llama.cpp'
      )
    factors = {
      name: self.file.read(name)
      for name in stretch_tensors(path, metadata)
      if shapes.pop(name, None)
    }
    self.config = read_metadata(path, metadata, shapes, factors)
    self._layout = Layout(self.config)
    check_tensors(self.file.path, shapes, self._layout.shapes)

  @property
  def paths(self) -> tuple[pathlib.Path, ...]:
    """The files that hold the weights."""
    return (self.file.path,)

  @property
  def title(self) -> str:
    """The file's name."""
    return self.file.path.name

  @property
  def eos_token_ids(self) -> tuple[int, ...]:
    """Ids that the metadata names as ends of a text or of a turn."""
    keys = ('eos', 'eot', 'eom')
    ids = [self.file.metadata.get(f'tokenizer.ggml.{k}_token_id') for k in keys]
    return tuple(i for i in ids if i is not None)

  def load_tokenizer(self) -> 'PreTrainedTokenizerFast':
    """Builds the tokenizer from the metadata."""
    return tokenizers.from_gguf(self.file.metadata)

  @property
  def precision(self) -> str:
    """The encoding that holds most weights, in words."""
    counts: collections.Counter[str] = collections.Counter()
    for info in self.file.tensors.values():
      counts[info.kind.name] += math.prod(info.shape)
    kind = counts.most_common(1)[0][0]
    return kind if kind in ('F32', 'F16', 'BF16') else f'dequantized {kind}'

  @property
  def half_dtype(self) -> str | None:
    """The dtype of most weights, where that has 16 bits."""
    words = {'F16': 'float16', 'BF16': 'bfloat16'}
    return words.get(self.precision)

  def read(
    self, name: str, dtype: np.dtype | type, index: Index | None = None
  ) -> np.ndarray:
    """Returns a weight, or a part of it, as Hugging Face lays it out.

    Args:
      name: Such as `model.layers.3.self_attn.q_proj.weight`.
      dtype: What the dequantized values are rounded to.
      index: One slice an axis; of the others, no row is read. None is
        everything.
    """
    place = self._layout.places[name]
    *stack, last = self.file.tensors[place.tensor].shape
    if stack:
      return self._read_matrix(place, stack[-1], dtype, index)
    vector = self.file.read(place.tensor) - np.float32(place.offset)
    if place.heads:
      vector = vector[rotary_rows(last, place.heads)]
    return vector[index or slice(None)].astype(dtype, copy=False)

  def _read_matrix(
    self,
    place: Place,
    count: int,
    dtype: np.dtype | type,
    index: Index | None,
  ) -> np.ndarray:
    """Returns a part of a matrix of `count` rows."""
    index = index or (slice(None),) * 2
    rows, columns = index[::-1] if place.turned else index
    first, last, _ = rows.indices(count)
    start = (place.expert or 0) * count
    rows = slice(start + first, start + last)
    if place.heads:
      rows = rotary_rows(count, place.heads)[rows]
    part = self.file.read(place.tensor, dtype, rows=rows, columns=columns)
    return part.T if place.turned else part
