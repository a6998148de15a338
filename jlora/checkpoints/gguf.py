"""GGUF files: their metadata and tensors, with every size checked first.

The header is walked here and not by the package's `GGUFReader`, which trusts
the counts it finds and makes an object for each of the 150,000 tokens and
merges. What the bytes of a tensor mean is the package's knowledge.

References:
  `GGUF specification <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_.
"""

import dataclasses
import functools
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from jlora.errors import BaseModelError

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_CHUNK = 1 << 22  # elements dequantized at once

# GGUF's number of a scalar type -> its struct format.
_SCALARS = {
  0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?',
  10: 'Q', 11: 'q', 12: 'd',
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where a tensor lies and how it is encoded.

  Attributes:
    shape: Rows first, as in numpy; GGUF writes the reverse.
    kind: The encoding, such as `Q4_1` or `F32`.
    offset: First byte in the file.
    size: Bytes in the file.
  """

  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  offset: int
  size: int


class GgufFile:
  """An open GGUF file; tensors are read and dequantized one at a time.

  Attributes:
    path: The file.
    metadata: Values by key; arrays of numbers are numpy arrays.
    tensors: TensorInfo by name.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads and checks the header.

    Args:
      path: A little-endian GGUF file of version 2 or 3.

    Raises:
      BaseModelError: The file is missing, is no whole GGUF file, or holds a
        tensor in an encoding that the `gguf` package does not decode.
    """
    self.path = pathlib.Path(path)
    try:
      with self.path.open('rb') as file:
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
      raise BaseModelError(f'{self.path} cannot be read: {error}') from error
    header = _Header(self.path, self._bytes)
    self.metadata = header.read_metadata()
    alignment = self.metadata.get('general.alignment', 32)
    self.tensors = header.read_tensors(alignment)
    self._check_kinds()

  def read(
    self,
    name: str,
    dtype: np.dtype | type = np.float32,
    *,
    rows: Any = slice(None),
    columns: slice = slice(None),
  ) -> np.ndarray:
    """Returns a tensor, or a part of it, dequantized.

    Args:
      name: A key of `tensors`.
      dtype: What the float32 values are rounded to.
      rows: A slice or indices along the first axis of a tensor with two; no
        other rows are read. One with more axes is taken as the matrix of all
        its rows.
      columns: A slice of step 1 along the last axis; no other blocks are
        dequantized.

    Returns:
      An array of the part's shape, with one axis or two.
    """
    info = self.tensors[name]
    data = np.frombuffer(self._bytes, np.uint8, info.size, info.offset)
    row = info.shape[-1]
    data = data.reshape(math.prod(info.shape) // row, -1)[rows]
    first, last, _ = columns.indices(row)
    block, size = gguf.GGML_QUANT_SIZES[info.kind]
    data = data[:, first // block * size : -(-last // block) * size]
    columns = slice(first % block, first % block + last - first)
    out = np.empty((len(data), last - first), dtype)
    step = max(1, _CHUNK // row)
    for start in range(0, len(data), step):
      part = np.ascontiguousarray(data[start : start + step])
      values = gguf.quants.dequantize(part, info.kind)
      out[start : start + step] = values[:, columns]
    return out if len(info.shape) > 1 else out.reshape(-1)

  def _check_kinds(self) -> None:
    for name, info in self.tensors.items():
      if not _is_decoded(info.kind):
        raise BaseModelError(
          f'{self.path}: {name} is encoded as {info.kind.name}, which this'
          ' version of the gguf package does not decode; use another file of'
          ' the model, such as Q8_0 or Q4_K_M'
        )


@functools.cache
def _is_decoded(kind: gguf.GGMLQuantizationType) -> bool:
  """Whether the package decodes an encoding; only trying says so."""
  block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
  try:
    gguf.quants.dequantize(block, kind)
  except NotImplementedError:
    return False
  return True


class _Header:
  """Walks a header; nothing is allocated that the file could not hold."""

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self._path = path
    self._data = data
    self._at = 0
    if self._take(4) != b'GGUF':
      raise self._error("it does not start with the bytes 'GGUF'")
    version = self._scalar('I')
    if version not in _VERSIONS:
      raise self._error(
        f'it has version {version}; readable are {_VERSIONS}, little-endian'
      )
    self._tensor_count = self._count(least_size=24)
    self._key_count = self._count(least_size=13)

  def _error(self, reason: str) -> BaseModelError:
    return BaseModelError(f'{self._path} is no whole GGUF file: {reason}')

  def _take(self, size: int) -> bytes:
    end = self._at + size
    if end > len(self._data):
      raise self._error(
        f'{size} bytes are announced at byte {self._at}, but the file has'
        f' {len(self._data)}'
      )
    part = self._data[self._at : end]
    self._at = end
    return part

  def _scalar(self, kind: str) -> Any:
    kind = '<' + kind
    return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

  def _count(self, least_size: int) -> int:
    """Reads a count of things that take at least `least_size` bytes each."""
    count = self._scalar('Q')
    if count * least_size > len(self._data) - self._at:
      raise self._error(
        f'{count} entries are announced at byte {self._at - 8}, more than fit'
        f' into {len(self._data)} bytes'
      )
    return count

  def _text(self) -> str:
    raw = self._take(self._scalar('Q'))
    try:
      return raw.decode()
    except UnicodeDecodeError as error:
      raise self._error(f'{raw[:40]!r} is no UTF-8') from error

  def read_metadata(self) -> dict[str, Any]:
    """Reads the values by key."""
    metadata: dict[str, Any] = {}
    for _ in range(self._key_count):
      key = self._text()
      if key in metadata:
        raise self._error(f'the key {key!r} is there twice')
      metadata[key] = self._value(self._scalar('I'), key)
    return metadata

  def _value(self, kind: int, key: str) -> Any:
    if kind in _SCALARS:
      return self._scalar(_SCALARS[kind])
    if kind == _STRING:
      return self._text()
    if kind == _ARRAY:
      return self._array(self._scalar('I'), key)
    raise self._error(f'{key!r} has the unknown type {kind}')

  def _array(self, kind: int, key: str) -> Any:
    if kind == _STRING:
      return [self._text() for _ in range(self._count(least_size=8))]
    if kind not in _SCALARS:
      raise self._error(f'{key!r} is an array of the unreadable type {kind}')
    dtype = np.dtype('<' + _SCALARS[kind])
    raw = self._take(self._count(dtype.itemsize) * dtype.itemsize)
    return np.frombuffer(raw, dtype)

  def read_tensors(self, alignment: int) -> dict[str, TensorInfo]:
    """Reads where the tensors lie; they must lie apart, inside the file."""
    if not isinstance(alignment, int) or alignment < 1:
      raise self._error(f'general.alignment is {alignment!r}')
    found: dict[str, TensorInfo] = {}
    for _ in range(self._tensor_count):
      name = self._text()
      if name in found:
        raise self._error(f'the tensor {name!r} is there twice')
      found[name] = self._tensor(name)
    start = -(-self._at // alignment) * alignment
    moved = {
      name: dataclasses.replace(info, offset=start + info.offset)
      for name, info in found.items()
    }
    self._check_places(moved)
    return moved

  def _tensor(self, name: str) -> TensorInfo:
    dimensions = self._scalar('I')
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
      raise self._error(f'{name!r} has {dimensions} dimensions')
    shape = tuple(self._scalar('Q') for _ in range(dimensions))[::-1]
    number, offset = self._scalar('I'), self._scalar('Q')
    try:
      kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
      raise self._error(f'{name!r} has the unknown encoding {number}') from (
        error
      )
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
      raise self._error(
        f'{name!r} has the shape {shape}, no multiple of {block} values a row'
      )
    size = math.prod(shape) // block * block_bytes
    return TensorInfo(shape, kind, offset, size)

  def _check_places(self, tensors: dict[str, TensorInfo]) -> None:
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
      if info.offset < end:
        raise self._error(f'{name!r} overlaps the tensor before it')
      end = info.offset + info.size
      if end > len(self._data):
        raise self._error(
          f'{name!r} ends at byte {end}, but the file has {len(self._data)}'
        )
