"""GGUF files that llama.cpp runs, written one tensor at a time."""

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from jlora.checkpoints.architectures import ARCHITECTURES, architecture_of
from jlora.checkpoints.folders import replacing_file
from jlora.checkpoints.gguf_config import write_metadata
from jlora.checkpoints.gguf_layout import Layout
from jlora.checkpoints.gguf_rope import Factors
from jlora.checkpoints.gguf_vocabulary import write_tokenizer
from jlora.core.tree import leaves_by_path
from jlora.errors import CheckpointError, ConfigError
from jlora.models import layout
from jlora.models.config import DecoderConfig

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

Kind = gguf.GGMLQuantizationType
Count = Callable[[np.ndarray, np.ndarray], None]

# What most weights are rounded to -> the number of such a file.
_FILE_TYPES = {
  'F32': gguf.LlamaFileType.ALL_F32,
  'F16': gguf.LlamaFileType.MOSTLY_F16,
  'BF16': gguf.LlamaFileType.MOSTLY_BF16,
  'Q8_0': gguf.LlamaFileType.MOSTLY_Q8_0,
}
KINDS = tuple(_FILE_TYPES)
# Of a block in Q8_0, the scale is a float16 and a code at most 127.
_LARGEST = {'F16': 65504.0, 'Q8_0': 127 * 65504.0}
_INTEGERS = {'token_type': 'int32'}  # other arrays of numbers are float32


# Weights with two axes that llama.cpp keeps in float32.
_FINE = ('layers/mlp/router/kernel', 'position_embed/embedding')


@dataclasses.dataclass(frozen=True)
class GgufPlan:
  """What a file will hold, checked before anything is written.

  Attributes:
    config: The decoder's sizes.
    metadata: Values by key, the tokenizer's among them.
    kinds: Encoding of each weight, by llama.cpp's names in the order in which
      they are written.
    factors: Tensors that say how the rotary wavelengths are stretched.
  """

  config: DecoderConfig
  metadata: Mapping[str, Any]
  kinds: Mapping[str, Kind]
  factors: Factors

  def describe(self) -> str:
    """Returns one line: how many tensors have which encoding."""
    counts = collections.Counter(kind.name for kind in self.kinds.values())
    return ', '.join(f'{n} tensors in {k}' for k, n in counts.most_common())


def plan_gguf(
  config: DecoderConfig,
  tokenizer: 'PreTrainedTokenizerBase',
  kind: str = 'F16',
  *,
  eos_token_ids: Sequence[int] = (),
  title: str = '',
) -> GgufPlan:
  """Checks that GGUF can express a model, and lays out its file.

  Norms, biases and whatever else has one axis stay float32. Where a row is no
  multiple of 32, Q8_0 gives way to F16.

  Args:
    config: The decoder's sizes.
    tokenizer: Stored with the model.
    kind: What weights are rounded to, one of KINDS.
    eos_token_ids: Ids that end a generation; empty for the tokenizer's own.
    title: A name for people; llama.cpp looks for some names of models in it.

  Raises:
    ConfigError: The model or the tokenizer has a feature that GGUF cannot
      express; it is named.
  """
  if kind not in KINDS:
    raise ConfigError(
      f'{kind!r} is not written as GGUF; use {", ".join(KINDS)}'
    )
  if architecture_of(config.family) is None:
    known = ', '.join(f for a in ARCHITECTURES.values() for f in a.families)
    raise ConfigError(
      f'a {config.family} model cannot be written as GGUF; known are {known}'
    )
  places = Layout(config)
  metadata, factors = write_metadata(config, places.shapes)
  metadata |= {
    'general.type': 'model',
    **({'general.name': title} if title else {}),
    'general.file_type': int(_FILE_TYPES[kind]),
    'general.quantization_version': gguf.GGML_QUANT_VERSION,
  }
  metadata |= write_tokenizer(tokenizer, config.vocab_size, eos_token_ids)
  kinds = {}
  for weight, layer in _in_order(config):
    name = places.tensor(weight, layer)
    fine = weight.path in _FINE
    kinds[name] = Kind.F32 if fine else _kind(places.shapes[name], kind)
  return GgufPlan(config, metadata, kinds, factors)


def _in_order(config: DecoderConfig) -> Iterator[tuple[layout.Weight, int]]:
  """Yields every leaf with each of its layers."""
  for weight in layout.weights(config):
    for layer in range(weight.stack[0] if weight.stacked else 1):
      yield weight, layer


def _kind(shape: tuple[int, ...], kind: str) -> Kind:
  if len(shape) < 2:
    return Kind.F32
  block, _ = gguf.GGML_QUANT_SIZES[Kind[kind]]
  return Kind.F16 if shape[-1] % block else Kind[kind]


def save_gguf(
  path: str | os.PathLike[str],
  plan: GgufPlan,
  params: Mapping[str, Any],
  *,
  count: Count = lambda written, given: None,
) -> None:
  """Writes a GGUF file; it appears complete or not at all.

  Args:
    path: Created, or replaced if it is a GGUF file.
    plan: From `plan_gguf`.
    params: The nested dict of dense arrays, or of leaves that make a layer
      each time one is asked for.
    count: Called with each tensor as a reader will have it, and as it was
      before it was rounded.

  Raises:
    ConfigError: The path is something else, or a value does not fit its
      encoding.
    CheckpointError: The leaves are not those of the plan, or the disk refused;
      what was there before is kept.
  """
  path = check_gguf_path(path)
  leaves = leaves_by_path(params)
  for weight in layout.weights(plan.config):
    leaf = leaves.get(weight.path)
    if leaf is None or tuple(leaf.shape) != weight.shape:
      raise CheckpointError(
        f'{weight.path} of shape {weight.shape} is not among the parameters'
      )
  with replacing_file(path) as new:
    writer = gguf.GGUFWriter(new, plan.metadata['general.architecture'])
    try:
      _write(writer, plan, leaves, count)
    finally:
      writer.close()


def check_gguf_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns where a file can be written, or raises a ConfigError."""
  path = pathlib.Path(path)
  if path.suffix != '.gguf' or path.is_dir():
    raise ConfigError(f'{path} is no name of a GGUF file; use NAME.gguf')
  if path.is_file():
    with path.open('rb') as file:
      if file.read(4) != b'GGUF':
        raise ConfigError(
          f'{path} would be replaced, but is no GGUF file; name a new one'
        )
  return path


def _write(
  writer: gguf.GGUFWriter,
  plan: GgufPlan,
  leaves: Mapping[str, Any],
  count: Count,
) -> None:
  places = Layout(plan.config)
  for key, value in plan.metadata.items():
    if key != 'general.architecture':  # which the writer has already
      _add(writer, key, value)
  for name, kind in plan.kinds.items():
    _announce(writer, name, places.shapes[name], kind)
  for name, factors in plan.factors.items():
    _announce(writer, name, factors.shape, Kind.F32)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for weight, layer in _in_order(plan.config):
    leaf = leaves[weight.path]
    values = np.asarray(leaf[layer] if weight.stacked else leaf, np.float32)
    kind = plan.kinds[places.tensor(weight, layer)]
    _check_range(weight.path, values, kind)
    arranged = np.ascontiguousarray(places.arrange(weight, values))
    data = gguf.quants.quantize(arranged, kind)
    count(gguf.quants.dequantize(data, kind), arranged)
    writer.write_tensor_data(data)
  for factors in plan.factors.values():
    writer.write_tensor_data(factors)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  """Adds a value of the type that llama.cpp expects."""
  if isinstance(value, list):
    kind = _INTEGERS.get(key.rsplit('.', 1)[1], 'float32')
    if value and isinstance(value[0], str):
      return writer.add_array(key, value)
    sub = gguf.GGUFValueType[kind.upper()]
    return writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub)
  adders = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
  }
  return adders[type(value)](key, value)


def _announce(
  writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind
) -> None:
  block, size = gguf.GGML_QUANT_SIZES[kind]
  stored = shape
  if kind not in (Kind.F32, Kind.F16):  # the writer takes the bytes' shape
    stored = (*shape[:-1], shape[-1] // block * size)
  writer.add_tensor_info(
    name,
    stored,
    np.dtype({Kind.F32: 'f4', Kind.F16: 'f2'}.get(kind, 'u1')),
    math.prod(shape) // block * size,
    raw_dtype=kind,
  )


def _check_range(name: str, tensor: np.ndarray, kind: Kind) -> None:
  largest = np.abs(tensor).max()
  limit = _LARGEST.get(kind.name, float(np.finfo(np.float32).max))
  if not largest <= limit:
    raise ConfigError(
      f'{name} holds values that are not finite as {kind.name}; the largest is'
      f' {largest}. Write it as BF16 or F32'
    )
