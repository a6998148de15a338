import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from jlora.checkpoints import shards
from jlora.errors import BaseModelError

ONE, TWO = (
  'model-00001-of-00002.safetensors',
  'model-00002-of-00002.safetensors',
)


@pytest.fixture
def folder(tmp_path):
  save_file({'a': np.ones(2, 'f4')}, tmp_path / ONE)
  save_file({'b': np.ones(3, 'f4')}, tmp_path / TWO)
  write_index(tmp_path, a=ONE, b=TWO)
  return tmp_path


def write_index(folder, **places):
  (folder / shards.INDEX).write_text(json.dumps({'weight_map': places}))


def read(folder):
  return shards.read_headers(folder, shards.locate(folder))


def test_shards_are_read_through_the_index(folder):
  assert read(folder) == {'a': ((2,), 'F32'), 'b': ((3,), 'F32')}


@pytest.mark.parametrize(
  'file',
  [
    '../outside.safetensors',
    '/etc/passwd',
    'sub/x.safetensors',
    'x.bin',
    '..',
    'a\0.safetensors',
    '..\\x.safetensors',
  ],
)
def test_an_index_that_points_outside_is_refused(folder, file):
  write_index(folder, a=ONE, b=file)
  with pytest.raises(BaseModelError, match='inside the folder'):
    read(folder)


def test_all_missing_shards_are_listed(folder):
  write_index(folder, a='model-x.safetensors', b='model-y.safetensors')
  with pytest.raises(BaseModelError, match=r'model-x.*model-y'):
    read(folder)


def test_a_shard_that_the_index_does_not_name_is_refused(folder):
  write_index(folder, a=ONE)
  with pytest.raises(BaseModelError, match=f'{TWO}.*does not name'):
    read(folder)


@pytest.mark.parametrize('places', [{'a': ONE, 'b': ONE}, {'a': TWO, 'b': ONE}])
def test_an_index_that_disagrees_with_its_shards_is_refused(folder, places):
  (folder / TWO).rename(folder / 'moved')
  save_file({'b': np.ones(3, 'f4')}, folder / TWO)
  if TWO not in places.values():
    (folder / TWO).unlink()
  write_index(folder, **places)
  with pytest.raises(BaseModelError, match='disagree about'):
    read(folder)


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"weight_map": []}'])
def test_a_malformed_index_is_refused(folder, content):
  (folder / shards.INDEX).write_text(content)
  with pytest.raises(BaseModelError, match=r'index\.json'):
    read(folder)


def raw(path, header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
  return path


def entry(shape, start, end, dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


@pytest.mark.parametrize(
  ('header', 'data', 'message'),
  [
    ({'a': entry([2], 0, 8)}, bytes(4), 'no whole safetensors'),
    (
      {'a': entry([2], 0, 8), 'b': entry([2], 4, 12)},
      bytes(12),
      'no whole safetensors',
    ),
    ({'a': entry([2**61], 0, 2**63)}, bytes(8), 'no whole safetensors'),
    (b'{"a":' * 2, b'', 'no whole safetensors'),
    (
      b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
      b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
      bytes(4),
      "'a' twice",
    ),
    (
      b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
      b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
      bytes(4),
      "'a' twice",
    ),
  ],
)
def test_a_damaged_file_is_refused(tmp_path, header, data, message):
  path = raw(tmp_path / 'x.safetensors', header, data)
  with pytest.raises(BaseModelError, match=message):
    shards.read_header(path)


def test_a_dtype_that_is_not_read_is_refused(tmp_path):
  path = raw(tmp_path / 'x', {'a': entry([2], 0, 2, 'U8')}, bytes(2))
  with pytest.raises(BaseModelError, match=r'a has dtype U8; .* F32'):
    shards.check_dtypes(path, shards.read_header(path))


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(struct.pack('<Q', 2**62) + b'{}')
  with pytest.raises(BaseModelError, match='no whole safetensors'):
    shards.read_header(path)


def test_every_truncation_is_refused(tmp_path):
  path = tmp_path / 'x.safetensors'
  save_file({'a': np.ones(4, 'f4'), 'b': np.ones(2, 'f4')}, path)
  whole = path.read_bytes()
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    with pytest.raises(BaseModelError):
      shards.read_header(path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x04')
  with pytest.raises(BaseModelError, match=r'pytorch_model\.bin.*convert'):
    shards.check_folder(tmp_path)
