"""Merged and packed folders of small models, against their definitions."""

import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.core.plan import Placeholder, is_frozen_leaf
from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.inference import exports, packing
from jlora.inference.merging import Distance, merged_leaves

FLOAT32 = exports.Files(dtype='float32')


def merge(tuned, into, dtype='float32'):
  distance = Distance()
  leaves = merged_leaves(tuned, distance, into=into, dtype=np.dtype(dtype))
  found = {
    path: np.stack([leaf[i] for i in range(leaf.shape[0])])
    if path.startswith('layers/')
    else np.asarray(leaf)
    for path, leaf in leaves
  }
  return found, distance


UP = '.*/up_proj/kernel'
CASES = {
  'lora': {'train_full': '.*norm/scale'},
  'dora': {
    'variant': 'dora',
    'targets': UP,
    'train_rows': {'embed/embedding': [3, 5]},
  },
  'pissa': {'init': 'pissa', 'targets': UP},
}


@pytest.mark.parametrize('name', CASES)
def test_the_default_is_the_function_that_was_trained(make_tuned, name):
  fields = CASES[name]
  tuned = make_tuned(**fields)
  found, distance = merge(tuned, 'trained')
  expected = jlora.merge(
    tuned.frozen, tuned.trainable, tuned.spec, dtype='float32'
  )
  for path, leaf in leaves_by_path(expected).items():
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-6)
  assert distance.share < 1e-5
  assert distance.tensors == 20  # seven kernels and two norms a layer, and two
  assert distance.adapted == {'lora': 14 + 5, 'dora': 2 + 1, 'pissa': 2}[name]


@pytest.mark.parametrize('fields', CASES.values(), ids=CASES)
def test_the_original_takes_what_the_adapter_changes(make_tuned, fields):
  tuned, dense = make_tuned(**fields), make_tuned(quant=None, **fields)
  found, distance = merge(tuned, 'original')
  expected = jlora.merge(dense.frozen, tuned.trainable, tuned.spec)
  for path, leaf in leaves_by_path(expected).items():
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-6)
  assert distance.share > 0.1


DISTANCES = {
  'all': {},
  'other kernels than are in codes': {
    'quant': jlora.QuantSpec(targets='.*/down_proj/kernel'),
    'targets': UP,
  },
  'rows': {'targets': (), 'train_rows': {'embed/embedding': [3, 5]}},
  'whole': {'targets': (), 'train_full': ('.*norm/scale', UP)},
}


@pytest.mark.parametrize('into', ['original', 'trained'])
@pytest.mark.parametrize('fields', DISTANCES.values(), ids=DISTANCES)
def test_the_distance_is_that_of_all_weights(make_tuned, fields, into):
  tuned = make_tuned(**fields)
  found, distance = merge(tuned, into, 'bfloat16')
  base = leaves_by_path(tuned.base.load_params())
  base |= {
    path: jlora.dequantize(leaf)
    for path, leaf in leaves_by_path(tuned.frozen, is_frozen_leaf).items()
    if not isinstance(leaf, Placeholder)
  }
  error = update = 0
  for path, leaf in leaves_by_path(tuned.dense('float32')).items():
    error += np.square(found[path].astype('f8') - leaf).sum()
    update += np.square(np.float64(base[path]) - leaf).sum()
  assert update > 0
  assert distance.share == pytest.approx(np.sqrt(error / update), rel=1e-4)
  assert f'by {distance.share:.1%} of the adapter' in str(distance)


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0'])
def test_a_gguf_file_is_as_far_as_it_is_rounded(make_tuned, tmp_path, kind):
  tuned = make_tuned(quant=None, targets=UP)
  _, distance = exports.write_gguf(tuned, tmp_path / 'm.gguf', kind)
  found = leaves_by_path(open_base(str(tmp_path / 'm.gguf')).load_params())
  expected = leaves_by_path(tuned.dense('float32'))
  base = leaves_by_path(tuned.base.load_params())
  error, update = (
    sum(np.square(x[p] - np.float64(y)).sum() for p, y in expected.items())
    for x in (found, base)
  )
  assert distance.share == pytest.approx(np.sqrt(error / update), rel=1e-4)
  assert distance.share > 0


def test_a_model_without_an_adapter_says_so():
  distance, ones = Distance(), np.ones(4, 'f4')
  distance.add(1.01 * ones, ones)
  assert 'no adapter, and the written weights' in str(distance)
  assert "differ from the model's by 1.00% of these" in str(distance)
  distance.add(ones, ones, ones)
  assert 'the adapter changes nothing' in str(distance)


def test_an_original_that_is_not_there_is_refused(make_tuned, tmp_path):
  packing.write_packed(make_tuned(), tmp_path / 'b', FLOAT32)
  tuned = make_tuned(tmp_path / 'b')
  with pytest.raises(ConfigError, match='not the weights that were quantized'):
    exports.write_merged(tuned, tmp_path / 'c', FLOAT32, into='original')
