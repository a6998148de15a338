"""A weight in 4 bits as bitsandbytes stores it, decoded as far as is asked for.

A weight `P` of shape [out, in] lies flattened, in blocks of consecutive values:

    P                        codes, two a byte, the first in the high nibble;
                             of any dtype, whose bytes are what counts
    P.absmax                 float32 a block, or uint8 when double-quantized
    P.quant_map              float32 [16], the value of each code
    P.nested_absmax          float32 for each 256 of absmax, with
    P.nested_quant_map       float32 [256]
    P.quant_state.…__nf4     JSON as bytes, or …__fp4

so absmax = nested_quant_map[uint8] * nested_absmax + offset, and a weight is
quant_map[code] * absmax, each operation rounded to float32.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jlora.checkpoints.weights import Index
from jlora.core import formats
from jlora.core.quantized import NESTED_BLOCK

STORAGE = {  # dtypes that codes may be stored as, and bytes of each
  'U8': 1,
  'I8': 1,
  'F16': 2,
  'BF16': 2,
  'F32': 4,
  'F64': 8,
}

_CHUNK = 1 << 20  # values decoded at once

# (name of a tensor, items from, items to) -> those of the flattened tensor
Read = Callable[[str, int, int], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How weights are quantized, as `QuantSpec` names it."""

  format: str
  block_size: int
  double_quant: bool

  def __str__(self) -> str:
    """Says it in words."""
    double = ' with double quantization' if self.double_quant else ''
    return f'{self.format} in blocks of {self.block_size}{double}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTensor:
  """A weight in 4 bits, still in its file.

  Attributes:
    name: Such as `model.layers.3.self_attn.q_proj.weight`.
    shape: [out, in].
    recipe: How it is quantized.
    dtype: What bitsandbytes decodes it to, by name.
    storage: The dtype in which the codes lie, as safetensors names it.
    offset: Added to each absmax, where they are double-quantized.
    read: Reads items of the tensors of this weight.
  """

  name: str
  shape: tuple[int, int]
  recipe: Recipe
  dtype: str
  storage: str
  offset: np.float32
  read: Read = dataclasses.field(repr=False, compare=False)

  @property
  def size(self) -> int:
    """Number of weights."""
    return math.prod(self.shape)

  @property
  def is_ours(self) -> bool:
    """Whether the codes mean what they do in a `QuantizedArray`."""
    levels = formats.FORMATS[self.recipe.format].levels
    same = np.array_equal(self._part('quant_map', 0, 16), levels)
    if same and self.recipe.double_quant:
      nested = self._part('nested_quant_map', 0, 256)
      same = np.array_equal(nested, formats.DYNAMIC)
    return same

  def packed(self, start: int, stop: int) -> np.ndarray:
    """Returns bytes of codes, uint8 [stop - start].

    Args:
      start: The first byte.
      stop: Behind the last one.
    """
    each = STORAGE[self.storage]
    first = start // each
    items = self.read(self.name, first, -(-stop // each))
    return items.view(np.uint8)[start - first * each :][: stop - start]

  def scales(self, start: int, stop: int) -> np.ndarray:
    """Returns `absmax` of blocks as stored, float32 or uint8."""
    return self._part('absmax', start, stop)

  def scales2(self) -> np.ndarray:
    """Returns `nested_absmax`, float32."""
    blocks = -(-self.size // self.recipe.block_size)
    return self._part('nested_absmax', 0, -(-blocks // NESTED_BLOCK))

  def decode(self, index: Index | None = None) -> np.ndarray:
    """Returns what a part of the weight stands for, float32.

    Args:
      index: One slice for each of out and in; None is all of it.
    """
    rows, columns = index or (slice(None), slice(None))
    out, size = self.shape
    rows, columns = range(out)[rows], columns.indices(size)[:2]
    decoded = np.empty((len(rows), columns[1] - columns[0]), np.float32)
    at_once = max(1, _CHUNK // size)
    for first in range(0, len(rows), at_once):
      part = rows[first : first + at_once]
      flat = self._decode_flat(part.start * size, part.stop * size)
      flat = flat.reshape(-1, size)[:, slice(*columns)]
      decoded[first : first + at_once] = flat
    return decoded

  def _decode_flat(self, start: int, stop: int) -> np.ndarray:
    """Returns values of the flattened weight."""
    block = self.recipe.block_size
    first, last = start // block, -(-stop // block)
    levels = self._part('quant_map', 0, 16)
    pairs = np.stack([np.repeat(levels, 16), np.tile(levels, 16)], axis=-1)
    end = -(-min(last * block, self.size) // 2)
    values = pairs[self.packed(first * block // 2, end)].reshape(-1)
    values.resize((last - first) * block, refcheck=False)
    blocks = values.reshape(-1, block)
    blocks *= self._absmax(first, last)[:, None]
    return values[start - first * block :][: stop - start]

  def _absmax(self, start: int, stop: int) -> np.ndarray:
    """Returns the float32 absmax of blocks, each step rounded."""
    scales = self.scales(start, stop)
    if not self.recipe.double_quant:
      return scales
    product = self._part('nested_quant_map', 0, 256)[scales]
    product *= self.scales2()[np.arange(start, stop) // NESTED_BLOCK]
    return product + self.offset

  def _part(self, part: str, start: int, stop: int) -> np.ndarray:
    return self.read(f'{self.name}.{part}', start, stop)
