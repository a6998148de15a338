"""Weights that bitsandbytes stored in 4 bits: found, and checked.

Which tensors are, is said by their names alone (see `packed.py`): files mix
them with others.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.packed import STORAGE, PackedTensor, Read, Recipe
from jlora.checkpoints.shards import Header
from jlora.core.quantized import NESTED_BLOCK
from jlora.errors import BaseModelError

STATE = '.quant_state.bitsandbytes__'

_PARTS = ('absmax', 'quant_map', 'nested_absmax', 'nested_quant_map')
_EIGHT_BITS = '.SCB'  # what an 8-bit weight has beside it
_LARGEST_STATE = 1 << 12  # bytes; a real one has less than two hundred


def without_quantization(
  where: Any, fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of config.json without those of 4-bit weights.

  Args:
    where: The folder, for messages.
    fields: As in config.json.

  Raises:
    BaseModelError: The model is quantized in another way.
  """
  fields = dict(fields)
  found = fields.pop('quantization_config', None) or {}
  if not isinstance(found, dict) or not found:
    found = {'quant_method': found} if found else {}
  if found.get('load_in_8bit'):
    raise BaseModelError(_eight_bits(where, {'load_in_8bit': True}))
  method = found.get('quant_method', 'bitsandbytes')
  if found and (method != 'bitsandbytes' or not found.get('load_in_4bit')):
    raise BaseModelError(
      f'{where} is quantized ({found!r:.80}); name the unquantized model and'
      ' let jlora quantize it, or one in 4 bits of bitsandbytes'
    )
  return fields


def find_packed(
  where: Any, header: Header, read: Read
) -> dict[str, PackedTensor]:
  """Returns the weights in 4 bits by name, each checked against its state.

  Args:
    where: The folder, for messages.
    header: Shapes and dtypes of all its tensors.
    read: Reads items of them.

  Raises:
    BaseModelError: A weight is in 8 bits, or what it needs is missing, damaged
      or of another size.
  """
  if eight := [name for name in header if name.endswith(_EIGHT_BITS)]:
    raise BaseModelError(_eight_bits(where, eight[0]))
  found = {}
  for name in header:
    weight, mark, format_name = name.partition(STATE)
    if not mark:
      continue
    if weight in found:
      raise BaseModelError(f'{where}: {weight} has two states')
    found[weight] = _make(where, weight, format_name, header, read)
  return found


def is_part(name: str, packed: Mapping[str, PackedTensor]) -> bool:
  """Whether a tensor only says how another one is decoded.

  Args:
    name: Of the tensor.
    packed: From `find_packed`.
  """
  weight, _, part = name.rpartition('.')
  is_state = STATE in name and name.partition(STATE)[0] in packed
  return is_state or (part in _PARTS and weight in packed)


def _eight_bits(where: Any, what: Any) -> str:
  """Returns why weights in 8 bits are not read, and what to do."""
  return (
    f'{where} is quantized to 8 bits by bitsandbytes ({what!r:.80}), whose'
    ' outliers depend on the inputs, so that no codes alone are the model; name'
    ' the unquantized model, or one in 4 bits'
  )


def _make(
  where: Any, name: str, format_name: str, header: Header, read: Read
) -> PackedTensor:
  where = f'{where}: {name}'
  fields = _load_state(where, f'{name}{STATE}{format_name}', header, read)
  nested = f'{name}.nested_absmax' in header
  recipe = Recipe(
    format=_one_of(where, fields, 'quant_type', ('nf4', 'fp4')),
    block_size=_size(where, 'blocksize', fields.get('blocksize')),
    double_quant=nested,
  )
  shape = fields.get('shape')
  if not isinstance(shape, list) or len(shape) != 2:
    raise BaseModelError(f'{where} has shape {shape!r}; a matrix has two sizes')
  tensor = PackedTensor(
    name=name,
    shape=tuple(_size(where, 'shape', size, even=False) for size in shape),
    recipe=recipe,
    dtype=_one_of(where, fields, 'dtype', ('float16', 'bfloat16', 'float32')),
    storage=header.get(name, ((), ''))[1],
    offset=_offset(where, fields) if nested else np.float32(0),
    read=read,
  )
  if nested:
    _one_of(where, fields, 'nested_blocksize', (NESTED_BLOCK,))
    _one_of(where, fields, 'nested_dtype', ('float32',))
  _check_sizes(where, tensor, header)
  return tensor


def _load_state(
  where: str, name: str, header: Header, read: Read
) -> dict[str, Any]:
  shape, kind = header[name]
  size = math.prod(shape)
  if kind != 'U8' or size > _LARGEST_STATE:
    raise BaseModelError(f'{where} has a state of {size} {kind}, not of JSON')
  try:
    fields = json.loads(read(name, 0, size).tobytes())
  except (ValueError, RecursionError) as error:
    raise BaseModelError(f'{where} has a damaged state: {error}') from error
  if not isinstance(fields, dict):
    raise BaseModelError(f'{where} has the state {fields!r:.60}, no object')
  return fields


def _one_of(
  where: str, fields: Mapping[str, Any], field: str, known: tuple[Any, ...]
) -> Any:
  if fields.get(field) not in known:
    raise BaseModelError(
      f'{where} has {field}={fields.get(field)!r}; readable are'
      f' {", ".join(map(repr, known))}'
    )
  return fields[field]


def _size(where: str, field: str, value: Any, even: bool = True) -> int:
  if type(value) is not int or value < 1 or (even and value % 2):
    raise BaseModelError(f'{where} has {field}={value!r}, which is no size')
  return value


def _offset(where: str, fields: Mapping[str, Any]) -> np.float32:
  value = fields.get('nested_offset')
  if type(value) not in (int, float) or not math.isfinite(value):
    raise BaseModelError(f'{where} has nested_offset={value!r}, no number')
  return np.float32(value)


def _check_sizes(where: str, tensor: PackedTensor, header: Header) -> None:
  """Checks that all parts are there, of the sizes that the state asks for."""
  blocks = -(-tensor.size // tensor.recipe.block_size)
  wanted = {'absmax': (blocks, 'F32'), 'quant_map': (16, 'F32')}
  if tensor.recipe.double_quant:
    wanted |= {
      'absmax': (blocks, 'U8'),
      'nested_absmax': (-(-blocks // NESTED_BLOCK), 'F32'),
      'nested_quant_map': (256, 'F32'),
    }
  for part, (size, kind) in wanted.items():
    shape, found = header.get(f'{tensor.name}.{part}', ((0,), 'nothing'))
    if (math.prod(shape), found) != (size, kind):
      raise BaseModelError(
        f'{where}.{part} is {math.prod(shape)} of {found}; its state asks for'
        f' {size} of {kind}'
      )
  shape, _ = header.get(tensor.name, ((0,), ''))
  each = STORAGE.get(tensor.storage, 0)
  found, size = math.prod(shape) * each, -(-tensor.size // 2)
  if not size <= found < size + max(each, 1):
    raise BaseModelError(
      f'{where} has {found} bytes of {tensor.storage or "nothing"}; its state'
      f' asks for {size}'
    )
