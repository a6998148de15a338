import struct

import gguf
import numpy as np
import pytest

from jlora.checkpoints.gguf import GgufFile
from jlora.errors import BaseModelError


def write(path, *, magic=b'GGUF', version=3, tensors=0, keys=0, rest=b''):
  path.write_bytes(magic + struct.pack('<IQQ', version, tensors, keys) + rest)
  return path


def text(value):
  return struct.pack('<Q', len(value)) + value


def tensor(name=b't', shape=(32,), kind=0, offset=0):
  return (
    text(name)
    + struct.pack(f'<I{len(shape)}Q', len(shape), *shape)
    + struct.pack('<IQ', kind, offset)
  )


def test_metadata_is_what_the_package_reads(tiny_gguf):
  oracle = gguf.GGUFReader(tiny_gguf)
  found = GgufFile(tiny_gguf).metadata
  names = {name for name in oracle.fields if not name.startswith('GGUF.')}
  assert found.keys() == names
  for name in names:
    np.testing.assert_array_equal(found[name], oracle.fields[name].contents())


def test_tensors_lie_where_the_package_finds_them(tiny_gguf):
  found = GgufFile(tiny_gguf).tensors
  for entry in gguf.GGUFReader(tiny_gguf).tensors:
    info = found[entry.name]
    assert info.shape == tuple(entry.shape[::-1])
    assert (info.offset, info.size) == (entry.data_offset, entry.n_bytes)


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q4_1', 'Q8_0'])
def test_tensors_are_dequantized_as_by_the_package(
  kind, write_gguf, tmp_path, monkeypatch
):
  monkeypatch.setattr('jlora.checkpoints.gguf._CHUNK', 200)  # several chunks
  path = write_gguf(tmp_path / 'x.gguf', kind)
  file = GgufFile(path)
  for entry in gguf.GGUFReader(path).tensors:
    expected = gguf.quants.dequantize(entry.data, entry.tensor_type)
    np.testing.assert_array_equal(file.read(entry.name), expected)


def decoded_kinds():
  """Encodings that the package dequantizes."""
  for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
    try:
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
      continue
    yield kind


@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # bytes that mean NaN
@pytest.mark.parametrize('kind', list(decoded_kinds()), ids=lambda k: k.name)
def test_parts_of_every_encoding_are_those_of_the_package(
  kind, tmp_path, monkeypatch
):
  monkeypatch.setattr('jlora.checkpoints.gguf._CHUNK', 3000)  # several chunks
  block, size = gguf.GGML_QUANT_SIZES[kind]
  width = max(block, 256) * 3
  raw = np.random.default_rng(0).integers(
    0, 256, (7, width // block * size), 'u1'
  )
  writer = gguf.GGUFWriter(tmp_path / 'x.gguf', 'llama')
  writer.add_tensor('t', raw, raw_dtype=kind)
  for step in ('header', 'kv_data', 'tensors'):
    getattr(writer, f'write_{step}_to_file')()
  writer.close()
  expected = gguf.quants.dequantize(raw, kind)
  file = GgufFile(tmp_path / 'x.gguf')
  np.testing.assert_array_equal(file.read('t'), expected)
  for rows in (slice(2, 5), np.array([6, 0, 3])):
    for columns in (slice(None), slice(0, 3), slice(block - 1, width - 9)):
      part = file.read('t', rows=rows, columns=columns)
      np.testing.assert_array_equal(part, expected[rows, columns])


def test_an_encoding_that_is_not_decoded_is_refused_as_it_is_opened(tmp_path):
  entry = tensor(shape=(256,), kind=gguf.GGMLQuantizationType.Q8_K)
  path = write(tmp_path / 'x.gguf', tensors=1, rest=entry + bytes(400))
  with pytest.raises(BaseModelError, match='t is encoded as Q8_K'):
    GgufFile(path)


def test_every_truncation_is_refused(tiny_gguf, tmp_path):
  whole = tiny_gguf.read_bytes()
  path = tmp_path / 'cut.gguf'
  for size in np.random.default_rng(0).integers(0, len(whole) - 32, 40):
    path.write_bytes(whole[:size])
    with pytest.raises(BaseModelError):
      GgufFile(path)


def test_flipped_header_bytes_never_crash(tiny_gguf, tmp_path):
  whole = bytearray(tiny_gguf.read_bytes())
  rng = np.random.default_rng(1)
  path = tmp_path / 'flipped.gguf'
  for _ in range(150):
    damaged = bytearray(whole)
    damaged[rng.integers(4, 900)] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    try:
      GgufFile(path)
    except BaseModelError as error:
      assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'magic': b'GGML'}, "'GGUF'"),
    ({'version': 1}, 'version 1'),
    ({'version': 3 << 24}, 'little-endian'),
    ({'tensors': 2**60}, 'entries are announced'),
    ({'keys': 2**60}, 'entries are announced'),
    ({'keys': 1, 'rest': struct.pack('<Q', 2**63) + bytes(9)}, 'announced'),
    (
      {'keys': 1, 'rest': text(b'k') + struct.pack('<IIQ', 9, 0, 2**40)},
      'entries are announced',
    ),
    (
      {'keys': 1, 'rest': text(b'k') + struct.pack('<IIQ', 9, 9, 1)},
      'unreadable type 9',
    ),
    ({'keys': 1, 'rest': text(b'k') + struct.pack('<I', 77)}, 'type 77'),
    ({'keys': 1, 'rest': text(b'\xff') + bytes(16)}, 'no UTF-8'),
    (
      {'keys': 2, 'rest': (text(b'k') + struct.pack('<IB', 0, 1)) * 2},
      'twice',
    ),
    ({'tensors': 1, 'rest': tensor(shape=(2**40,))}, 'ends at byte'),
    ({'tensors': 1, 'rest': tensor(shape=(0,))}, 'shape'),
    ({'tensors': 1, 'rest': tensor(shape=(33,), kind=3)}, 'multiple of 32'),
    ({'tensors': 1, 'rest': tensor(shape=(1,) * 5)}, '5 dimensions'),
    ({'tensors': 1, 'rest': tensor(kind=999)}, 'unknown encoding 999'),
    (
      {'tensors': 2, 'rest': tensor() * 2 + bytes(500)},
      "'t' is there twice",
    ),
    (
      {'tensors': 2, 'rest': tensor() + tensor(b'u') + bytes(500)},
      'overlaps',
    ),
  ],
)
def test_a_header_that_cannot_be_true_is_refused(tmp_path, fields, message):
  path = write(tmp_path / 'x.gguf', **fields)
  with pytest.raises(BaseModelError, match=message):
    GgufFile(path)


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(BaseModelError, match='cannot be read'):
    GgufFile(tmp_path / 'none.gguf')
