"""Folders in 4 bits as bitsandbytes writes them, for transformers to load."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.checkpoints.bitsandbytes import STATE
from jlora.checkpoints.model_folders import (
  MAX_SHARD_SIZE,
  check_dtype,
  save_tensors,
  stored_tensors,
)
from jlora.checkpoints.shard_files import Entry
from jlora.checkpoints.weights import listed, stored_shapes
from jlora.core import formats
from jlora.core.quantized import NESTED_BLOCK, QuantizedArray
from jlora.errors import ConfigError
from jlora.models import layout
from jlora.models.config import DecoderConfig
from jlora.models.hf_config import write_config
from jlora.models.layout import Weight

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_FORMATS = ('nf4', 'fp4')
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

Parts = dict[str, np.ndarray]


def choose_packed(
  config: DecoderConfig, leaves: Mapping[str, QuantizedArray]
) -> dict[str, QuantizedArray]:
  """Returns the kernels that bitsandbytes can hold in these very codes.

  Its blocks run on from row to row. So kernels whose rows are no whole number
  of blocks are left out: their codes would have to be others.

  Args:
    config: The decoder's.
    leaves: Kernels by path.

  Raises:
    ConfigError: bitsandbytes has no form for what is left, or nothing is.
  """
  for path, leaf in leaves.items():
    if leaf.format not in _FORMATS or leaf.block_size not in _BLOCK_SIZES:
      raise ConfigError(
        f'{path!r} is in {leaf.format} in blocks of {leaf.block_size};'
        f' bitsandbytes has {" and ".join(_FORMATS)} in blocks of'
        f' {", ".join(map(str, _BLOCK_SIZES))}'
      )
  by_path = layout.by_path(config)
  if others := {p for p in leaves if len(by_path[p].stack) > 1}:
    raise ConfigError(
      f'{listed(others)} is in 4 bits, and transformers holds the experts of a'
      ' layer as one tensor, for which bitsandbytes has no form'
    )
  if others := {path for path in leaves if not by_path[path].linear}:
    raise ConfigError(
      f'{listed(others)} is in 4 bits and no linear layer, which is all that'
      ' bitsandbytes holds'
    )
  packed = {
    path: leaf
    for path, leaf in leaves.items()
    if leaf.inputs[0] % leaf.block_size == 0
  }
  if not packed:
    raise ConfigError(
      'no kernel is in 4 bits in a way that bitsandbytes can hold'
    )
  return packed


def save_packed(
  folder: str | os.PathLike[str],
  config: DecoderConfig,
  packed: Mapping[str, QuantizedArray],
  dense: Iterable[tuple[str, Any]],
  tokenizer: 'PreTrainedTokenizerBase',
  dtype: Any,
  *,
  eos_token_ids: Sequence[int] = (),
  max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
  """Writes a model in 4 bits; the codes are those of `packed`, byte for byte.

  Args:
    folder: As in `save_folder`.
    config: The decoder's.
    packed: Kernels by path, from `choose_packed`.
    dense: Pairs of path and leaf of all others, in any order.
    tokenizer: As in `save_folder`.
    dtype: What the others are rounded to, and codes are decoded to.
    eos_token_ids: As in `save_folder`.
    max_shard_size: As in `save_folder`.

  Raises:
    ConfigError: As in `save_folder`.
    CheckpointError: As in `save_folder`.
  """
  dtype = check_dtype(dtype)
  by_path = layout.by_path(config)
  shapes = stored_shapes(config)
  entries = {name: Entry(shape, dtype) for name, shape in shapes.items()}
  for path, leaf in packed.items():
    names = by_path[path].tensors
    # Only the state's length differs from layer to layer, by its offset.
    for name, parts in zip(names, _layers(leaf, dtype), strict=True):
      found = {f'{name}{part}': x for part, x in parts.items()}
      entries |= {key: Entry(x.shape, x.dtype) for key, x in found.items()}
  save_tensors(
    folder,
    {
      **write_config(config),
      'dtype': dtype.name,
      'quantization_config': _quantization(by_path, packed, dtype),
    },
    entries,
    itertools.chain(
      _packed_tensors(by_path, packed, dtype), stored_tensors(config, dense)
    ),
    tokenizer,
    eos_token_ids=eos_token_ids,
    max_shard_size=max_shard_size,
  )


def pack_layer(
  codes: np.ndarray,
  scales: np.ndarray,
  scales2: np.ndarray | None,
  offset: np.ndarray | None,
  *,
  number_format: str,
  block_size: int,
  dtype: str,
) -> Parts:
  """Returns what bitsandbytes stores of one kernel, by its suffix.

  Args:
    codes: uint8 [in / 2, out].
    scales: [in / block, out].
    scales2: As in `QuantizedArray`, or None.
    offset: Likewise.
    number_format: 'nf4' or 'fp4'.
    block_size: Weights of a block.
    dtype: What it is decoded to.
  """
  state = {
    'quant_type': number_format,
    'blocksize': block_size,
    'dtype': dtype,
    'shape': [codes.shape[1], 2 * codes.shape[0]],
  }
  parts = {
    '': codes.T.reshape(-1, 1),
    '.absmax': scales.T.reshape(-1),
    '.quant_map': formats.FORMATS[number_format].levels,
  }
  if scales2 is not None:
    parts['.nested_absmax'] = scales2
    parts['.nested_quant_map'] = formats.DYNAMIC
    state |= {
      'nested_blocksize': NESTED_BLOCK,
      'nested_dtype': 'float32',
      'nested_offset': float(offset),
    }
  content = np.frombuffer(json.dumps(state).encode(), np.uint8)
  return {**parts, f'{STATE}{number_format}': content}


def _layers(leaf: QuantizedArray, dtype: np.dtype) -> Iterator[Parts]:
  """Yields what bitsandbytes stores of each layer, in their order."""
  fields = (leaf.codes, leaf.scales, leaf.scales2, leaf.offset)
  for place in np.ndindex(leaf.stacked):
    yield pack_layer(
      *(None if x is None else np.asarray(x[place]) for x in fields),
      number_format=leaf.format,
      block_size=leaf.block_size,
      dtype=dtype.name,
    )


def _packed_tensors(
  by_path: Mapping[str, Weight],
  packed: Mapping[str, QuantizedArray],
  dtype: np.dtype,
) -> Iterator[tuple[str, np.ndarray]]:
  for path, leaf in packed.items():
    names = by_path[path].tensors
    for name, parts in zip(names, _layers(leaf, dtype), strict=True):
      yield from ((f'{name}{part}', x) for part, x in parts.items())


def _quantization(
  by_path: Mapping[str, Weight],
  packed: Mapping[str, QuantizedArray],
  dtype: np.dtype,
) -> dict[str, Any]:
  """Returns `quantization_config`, in which all other kernels are left out."""
  leaf = next(iter(packed.values()))
  skipped = {
    module
    for path, weight in by_path.items()
    if weight.linear and path not in packed
    for module in weight.modules
  }
  if 'lm_head/kernel' not in packed:  # of a tied head, too
    skipped.add('lm_head')
  return {
    'quant_method': 'bitsandbytes',
    'load_in_4bit': True,
    'load_in_8bit': False,
    'bnb_4bit_quant_type': leaf.format,
    'bnb_4bit_use_double_quant': leaf.scales2 is not None,
    'bnb_4bit_compute_dtype': dtype.name,
    'bnb_4bit_quant_storage': 'uint8',
    'llm_int8_skip_modules': sorted(skipped),
  }
