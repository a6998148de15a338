import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora.checkpoints import shards
from jlora.checkpoints.shard_files import Entry, as_bytes, write_model
from jlora.errors import CheckpointError, ConfigError

RNG = np.random.default_rng(0)
TENSORS = {
  'w': RNG.normal(size=(3, 5)).astype('f4'),
  'v': RNG.normal(size=7).astype('f4'),
  'u': np.arange(5, dtype=np.uint8),
  'a': RNG.normal(size=(1, 2)).astype('f2'),
}
ENTRIES = {name: Entry(x.shape, x.dtype) for name, x in TENSORS.items()}


@pytest.mark.parametrize('largest', [1000, 60, 40, 1])
def test_written_files_are_read_by_the_library(tmp_path, largest):
  write_model(tmp_path, ENTRIES, TENSORS.items(), largest=largest)
  files = sorted(tmp_path.glob('*.safetensors'))
  assert len(files) == {1000: 1, 60: 2, 40: 2, 1: 4}[largest]
  found = {}
  for file in files:
    tensors = load_file(file)
    size = sum(x.nbytes for x in tensors.values())
    assert size <= largest or len(tensors) == 1
    found |= tensors
  assert found.keys() == TENSORS.keys()
  for name, tensor in TENSORS.items():
    np.testing.assert_array_equal(found[name], tensor)


def test_shards_have_the_index_that_reading_goes_by(tmp_path):
  write_model(tmp_path, ENTRIES, TENSORS.items(), largest=60)
  index = json.loads((tmp_path / shards.INDEX).read_text())
  assert index['metadata'] == {'total_size': 60 + 28 + 5 + 4}
  header = shards.read_headers(tmp_path, shards.locate(tmp_path))
  assert header['w'] == ((3, 5), 'F32')
  assert header['u'] == ((5,), 'U8')


def test_every_tensor_comes_once_and_in_its_shape(tmp_path):
  def write(*tensors):
    (tmp_path / 'model.safetensors').unlink(missing_ok=True)
    write_model(tmp_path, ENTRIES, tensors, largest=1000)

  *others, last = TENSORS.items()
  with pytest.raises(CheckpointError, match="would lack 'a'"):
    write(*others)
  with pytest.raises(CheckpointError, match='v comes twice'):
    write(*others, others[1])
  with pytest.raises(CheckpointError, match=r'a has shape \(2, 1\)'):
    write(*others, ('a', last[1].T))


@pytest.mark.parametrize(
  ('size', 'count'),
  [('5GB', 5 * 10**9), ('1.5 MiB', 3 << 19), (17, 17), ('200kb', 200_000)],
)
def test_sizes_are_read(size, count):
  assert as_bytes(size) == count


@pytest.mark.parametrize('size', ['', 'GB', '-1GB', '5XB', '0', '1 2', None])
def test_what_is_no_size_is_refused(size):
  with pytest.raises(ConfigError, match="such as '5GB'"):
    as_bytes(size)
