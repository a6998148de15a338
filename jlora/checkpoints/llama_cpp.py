"""How llama.cpp writes a model into a GGUF file, undone.

Its names differ from Hugging Face's. In some architectures the rows of the
query and key projections are permuted so that the two features of a rotary pair
are neighbors. Llama 3's stretch of the wavelengths is stored as a tensor of
divisors.

References:
  `convert_hf_to_gguf.py <https://github.com/ggml-org/llama.cpp>`_, classes
  `LlamaModel`, `SmolLM3Model`, `Qwen2Model` and `Qwen3Model`.
"""

import collections
import dataclasses
import functools
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from jlora.checkpoints import tokenizers
from jlora.checkpoints.gguf import GgufFile
from jlora.checkpoints.weights import (
  Index,
  check_sizes,
  check_tensors,
  stored_shapes,
)
from jlora.errors import BaseModelError
from jlora.models import rotary
from jlora.models.config import DecoderConfig
from jlora.models.hf_config import read_config
from jlora.models.rope_scaling import Llama3Scaling

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# Whether rows are permuted, by architecture, which is the family's name too.
# Mistral's models are written as Llama's.
_ARCHITECTURES = {
  'llama': True,
  'qwen2': False,
  'qwen3': False,
  'smollm3': True,
}
_ROPE_FACTORS = 'rope_freqs.weight'

# GGUF key behind the architecture's name -> field of config.json.
_FIELDS = {
  'block_count': 'num_hidden_layers',
  'embedding_length': 'hidden_size',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'context_length': 'max_position_embeddings',
  'rope.freq_base': 'rope_theta',
}


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
    self.config = _read_config(self.file)
    self._check_tensors()

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
    module = name.removesuffix('.weight')
    name = self._name(name)
    if len(self.file.tensors[name].shape) < 2:
      weight = self.file.read(name, dtype)
      return weight[index] if index else weight
    rows, columns = index or (slice(None),) * 2
    for kind, heads in self._rotary_heads.items():
      if module.endswith(kind):
        rows = rotary_rows(self.file.tensors[name].shape[0], heads)[rows]
    return self.file.read(name, dtype, rows=rows, columns=columns)

  @property
  def _rotary_heads(self) -> dict[str, int]:
    """Heads of the weights whose rows llama.cpp gives another order."""
    if not _ARCHITECTURES[self.config.family]:
      return {}
    return {
      '.self_attn.q_proj': self.config.heads,
      '.self_attn.k_proj': self.config.kv_heads,
    }

  @functools.cached_property
  def _names(self) -> gguf.TensorNameMap:
    arch = gguf.MODEL_ARCH[self.config.family.upper()]
    return gguf.get_tensor_name_map(arch, self.config.layers)

  def _name(self, name: str) -> str:
    return self._names.get_name(name, try_suffixes=('.weight', '.bias'))

  def _check_tensors(self) -> None:
    found = {name: info.shape for name, info in self.file.tensors.items()}
    found.pop(_ROPE_FACTORS, None)
    wanted = {
      self._name(name): shape
      for name, shape in stored_shapes(self.config).items()
    }
    check_tensors(self.file.path, found, wanted)


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


def _read_config(file: GgufFile) -> DecoderConfig:
  meta = file.metadata
  kind = meta.get('general.architecture')
  if kind not in _ARCHITECTURES:
    known = ', '.join(map(repr, _ARCHITECTURES))
    raise BaseModelError(
      f'{file.path} has the architecture {kind!r}; this version reads {known}'
    )
  fields = {
    field: _plain(meta[f'{kind}.{key}'])
    for key, field in _FIELDS.items()
    if f'{kind}.{key}' in meta
  }
  embedding = file.tensors.get('token_embd.weight')
  if embedding is None:
    raise BaseModelError(f"{file.path} lacks the tensor 'token_embd.weight'")
  fields['model_type'] = kind
  fields['vocab_size'] = embedding.shape[0]
  fields['tie_word_embeddings'] = 'output.weight' not in file.tensors
  check_sizes(file.path, fields, len(file.tensors))
  config = read_config(fields)
  _check_features(file, config)
  return _with_rope_scaling(file, config)


def _plain(value: Any) -> Any:
  """Returns float32 metadata as the decimal that was rounded to it."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_features(file: GgufFile, config: DecoderConfig) -> None:
  wanted = {
    'rope.dimension_count': config.head_dim,
    'attention.value_length': config.head_dim,
    'rope.scaling.type': 'none',
    'expert_count': 0,
  }
  for key, value in wanted.items():
    found = file.metadata.get(f'{config.family}.{key}', value)
    if found != value:
      raise BaseModelError(
        f'{file.path} has {config.family}.{key}={found!r}, which this decoder'
        f' does not compute; it needs {value!r}'
      )


def _with_rope_scaling(file: GgufFile, config: DecoderConfig) -> DecoderConfig:
  """Recognizes Llama 3's stretch in the divisors it was written as."""
  if _ROPE_FACTORS not in file.tensors:
    return config
  factors = file.read(_ROPE_FACTORS)
  scaling = Llama3Scaling(factor=float(factors.max()))
  scaled = dataclasses.replace(config, rope_scaling=scaling)
  expected = rotary.frequencies(config) / rotary.frequencies(scaled)
  if factors.shape != expected.shape or not np.allclose(
    factors, expected, rtol=1e-4, atol=0
  ):
    raise BaseModelError(
      f'{file.path} stretches the rotary wavelengths by other factors than'
      " Llama 3's; load the model from its Hugging Face folder instead"
    )
  return scaled
