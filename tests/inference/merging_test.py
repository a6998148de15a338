"""Merged and packed folders of small models, against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.model_folders import save_folder
from jlora.checkpoints.packed_folders import choose_packed, save_packed
from jlora.checkpoints.placement import load_split
from jlora.core.quantized import is_quantized
from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.inference import exports
from jlora.inference.merging import Distance, merged_leaves
from jlora.inference.requantizing import requantize
from jlora.inference.tuned import Tuned, load_tuned
from jlora.models import families
from tests.decoders import make_params

FLOAT32 = exports.Files(dtype='float32')


@pytest.fixture(scope='module')
def square_base(tiny_base, tmp_path_factory):
  """A folder whose kernels have one shape, and compile once."""
  tiny = open_base(str(tiny_base))
  config = dataclasses.replace(tiny.config, mlp_dim=64, kv_heads=4)
  folder = tmp_path_factory.mktemp('square') / 'base'
  save_folder(folder, config, make_params(config), tiny.tokenizer)
  return folder


@pytest.fixture(scope='module')
def make_tuned(square_base):
  """Returns a function of the base, its quantization and LoraSpec's fields."""

  def make(base=None, quant=True, size=0.02, **fields):
    base = open_base(str(base or square_base))
    spec = jlora.LoraSpec(**{'rank': 4, 'alpha': 6.0, **fields})
    spec = families.resolve(spec, base.config)
    quant = jlora.QuantSpec() if quant is True else quant
    quant = quant and families.resolve(quant, base.config)
    key = jax.random.key(0)
    frozen, begun, starts = load_split(
      key, base, spec, quant, jnp.float32, starts=None
    )
    random = np.random.default_rng(1)
    trained = jax.tree.map(
      lambda x: jnp.asarray(x + random.normal(0, size, x.shape), 'f4'), begun
    )
    return Tuned(
      base=base,
      frozen=frozen,
      trainable=trained,
      starts=starts,
      spec=spec,
      quant=quant,
      dtype='float32',
      apply=None,
      metadata={'base_sha256': 'of the dense base', 'step': 3},
    )

  return make


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


@pytest.mark.parametrize('fields', CASES.values(), ids=CASES)
def test_the_default_is_the_function_that_was_trained(make_tuned, fields):
  tuned = make_tuned(**fields)
  found, distance = merge(tuned, 'trained')
  expected = jlora.merge(
    tuned.frozen, tuned.trainable, tuned.spec, dtype='float32'
  )
  for path, leaf in leaves_by_path(expected).items():
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-6)
  assert distance.share < 1e-5
  assert distance.kernels == 2 * (1 if 'targets' in fields else 7)


@pytest.mark.parametrize('fields', CASES.values(), ids=CASES)
def test_the_original_takes_what_the_adapter_changes(make_tuned, fields):
  tuned, dense = make_tuned(**fields), make_tuned(quant=None, **fields)
  found, distance = merge(tuned, 'original')
  expected = jlora.merge(dense.frozen, tuned.trainable, tuned.spec)
  for path, leaf in leaves_by_path(expected).items():
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-6)
  assert distance.share > 0.1


def test_the_distance_is_that_of_the_weights(make_tuned):
  tuned = make_tuned()
  found, distance = merge(tuned, 'original', 'bfloat16')
  trained = leaves_by_path(tuned.dense('float32'))
  frozen = leaves_by_path(jlora.dequantize(tuned.frozen))
  error = update = 0
  for path in trained:
    if path.endswith('kernel'):
      written = found[path].astype('f8')
      error += np.square(written - trained[path]).sum()
      update += np.square(frozen[path] - np.float64(trained[path])).sum()
  assert distance.share == pytest.approx(np.sqrt(error / update), rel=1e-4)
  share = f'{distance.share:.1%}'
  assert f'by {share} of the adapter' in str(distance)
  assert str(Distance()) == 'the adapter changes nothing'


@pytest.mark.parametrize(
  'quant', [{}, {'format': 'fp4', 'double_quant': False, 'block_size': 32}]
)
def test_codes_are_written_as_they_are_and_read_again(
  make_tuned, tmp_path, quant
):
  tuned = make_tuned(quant=jlora.QuantSpec(**quant), init='pissa', targets=UP)
  exports.write_packed(tuned, tmp_path / 'b', FLOAT32)
  adapter = load_tuned(str(tmp_path / 'b'), tmp_path / 'b-adapter')
  jax.tree.map(
    np.testing.assert_array_equal,
    (adapter.frozen, adapter.trainable),
    (tuned.frozen, tuned.trainable),
  )
  assert adapter.spec.init == 'lora'  # the codes are without its start
  assert adapter.metadata['step'] == 3


def test_a_folder_written_again_is_the_same_bytes(make_tuned, tmp_path):
  quant = jlora.QuantSpec(exclude=('.*/up_proj/.*',))
  exports.write_packed(make_tuned(quant=quant), tmp_path / 'a', FLOAT32)
  again = make_tuned(tmp_path / 'a')
  assert len(again.base.codes.leaves) == 6
  leaves = leaves_by_path(again.frozen, is_quantized)
  codes = {path: x for path, x in leaves.items() if is_quantized(x)}
  save_packed(
    tmp_path / 'b',
    again.base.config,
    choose_packed(again.base.config, codes),
    [x for x in again.base.leaves().items() if x[0] not in codes],
    again.base.tokenizer,
    'float32',
    eos_token_ids=again.base.eos_token_ids,
  )
  said = exports.write_packed(again, tmp_path / 'c', FLOAT32)
  assert 'are copied' in said[0]
  for path in (tmp_path / 'a').iterdir():
    for copy in ('b', 'c'):
      assert (tmp_path / copy / path.name).read_bytes() == path.read_bytes()


def test_rows_that_blocks_do_not_divide_are_decoded_and_counted(
  make_tuned, tiny_base, tmp_path
):
  tuned = make_tuned(tiny_base, quant=jlora.QuantSpec(block_size=128))
  said = exports.write_packed(tuned, tmp_path / 'b', FLOAT32)
  assert '1 leaves are written' in said[0]
  assert '6 more, whose rows are no whole number of blocks, are' in said[0]
  again = open_base(str(tmp_path / 'b'))
  assert again.codes.leaves.keys() == {'layers/mlp/down_proj/kernel'}
  jax.tree.map(
    np.testing.assert_array_equal,
    again.load_params(),
    jlora.dequantize(tuned.frozen),
  )


@pytest.mark.parametrize(
  ('quant', 'message'),
  [
    (None, 'in full precision here.*--to=merged'),
    (jlora.QuantSpec(format='int8'), 'int8 in blocks of 64'),
    (jlora.QuantSpec(block_size=48), 'in blocks of 48; bitsandbytes has'),
    (jlora.QuantSpec(block_size=256), 'no kernel is in 4 bits in a way'),
    (
      jlora.QuantSpec(targets='embed/embedding'),
      "'embed/embedding' is in 4 bits and no linear layer",
    ),
  ],
)
def test_what_bitsandbytes_cannot_hold_is_refused(
  make_tuned, tmp_path, quant, message
):
  tuned = make_tuned(quant=quant, targets='mlp')
  with pytest.raises(ConfigError, match=message):
    exports.write_packed(tuned, tmp_path / 'b', FLOAT32)
  assert not list(tmp_path.iterdir())


def test_an_original_that_is_not_there_is_refused(make_tuned, tmp_path):
  exports.write_packed(make_tuned(), tmp_path / 'b', FLOAT32)
  tuned = make_tuned(tmp_path / 'b')
  with pytest.raises(ConfigError, match='not the weights that were quantized'):
    exports.write_merged(tuned, tmp_path / 'c', FLOAT32, into='original')


def test_quantizing_again_takes_a_small_adapter_out(make_tuned, tmp_path):
  tuned = make_tuned(size=1e-3)
  found = requantize(tuned)
  assert found.changed < 0.01
  assert found.distance.share > 0.5
  assert "% of the adapted kernels' codes change" in str(found)
  exports.write_requantized(tuned, tmp_path / 'b', FLOAT32, found)
  again = make_tuned(tmp_path / 'b')
  for path, leaf in found.codes.items():
    kernel = leaves_by_path(again.frozen, is_quantized)
    np.testing.assert_array_equal(kernel[path].codes, leaf.codes)
