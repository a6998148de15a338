"""4-bit folders of small models and the adapters beside them."""

import json

import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.packed_folders import choose_packed, save_packed
from jlora.core.quantized import is_quantized
from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.inference import exports, packing
from jlora.inference.requantizing import requantize
from jlora.inference.tuned import load_tuned

FLOAT32 = exports.Files(dtype='float32')
UP = '.*/up_proj/kernel'


@pytest.mark.parametrize(
  'quant', [{}, {'format': 'fp4', 'double_quant': False, 'block_size': 32}]
)
def test_codes_are_written_as_they_are_and_read_again(
  make_tuned, tmp_path, quant
):
  tuned = make_tuned(quant=jlora.QuantSpec(**quant), init='pissa', targets=UP)
  packing.write_packed(tuned, tmp_path / 'b', FLOAT32)
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
  packing.write_packed(make_tuned(quant=quant), tmp_path / 'a', FLOAT32)
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
  said = packing.write_packed(again, tmp_path / 'c', FLOAT32)
  assert 'are copied' in said[0]
  for path in (tmp_path / 'a').iterdir():
    for copy in ('b', 'c'):
      assert (tmp_path / copy / path.name).read_bytes() == path.read_bytes()


def test_rows_that_blocks_do_not_divide_are_decoded_and_counted(
  make_tuned, tiny_base, tmp_path
):
  tuned = make_tuned(tiny_base, quant=jlora.QuantSpec(block_size=128))
  said = packing.write_packed(tuned, tmp_path / 'b', FLOAT32)
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
    (None, 'in full precision here'),
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
    packing.write_packed(tuned, tmp_path / 'b', FLOAT32)
  assert not list(tmp_path.iterdir())


def test_quantizing_again_takes_a_small_adapter_out(make_tuned, tmp_path):
  tuned = make_tuned(size=1e-3)
  found = requantize(tuned, np.dtype('float32'))
  assert found.changed < 0.01
  assert found.distance.share > 0.5
  assert "% of the adapted kernels' codes change" in str(found)
  packing.write_requantized(tuned, tmp_path / 'b', FLOAT32, found)
  again = make_tuned(tmp_path / 'b')
  for path, leaf in found.codes.items():
    kernel = leaves_by_path(again.frozen, is_quantized)
    np.testing.assert_array_equal(kernel[path].codes, leaf.codes)


def assert_same_function(found, expected):
  """Compares weights, for these make the function."""
  found, expected = (
    leaves_by_path(x.dense('float32')) for x in (found, expected)
  )
  for path, leaf in expected.items():
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-6)


@pytest.mark.parametrize('init', ['pissa', 'olora'])
def test_what_an_adapter_began_with_is_left_out_of_dense_kernels(
  make_tuned, tmp_path, init
):
  quant = jlora.QuantSpec(targets='.*/down_proj/kernel')
  tuned = make_tuned(quant=quant, init=init, targets=UP, alpha=4.0)
  packing.write_packed(tuned, tmp_path / 'b', FLOAT32)
  again = load_tuned(str(tmp_path / 'b'), tmp_path / 'b-adapter')
  assert_same_function(again, tuned)


def test_a_copied_base_keeps_what_an_adapter_began_with(make_tuned, tmp_path):
  packing.write_packed(make_tuned(), tmp_path / 'a', FLOAT32)
  tuned = make_tuned(tmp_path / 'a', quant=None, init='pissa', targets=UP)
  packing.write_packed(tuned, tmp_path / 'b', FLOAT32)
  again = load_tuned(str(tmp_path / 'b'), tmp_path / 'b-adapter')
  assert not again.codes
  assert_same_function(again, tuned)
  beside = tmp_path / 'b-adapter/adapter_config.json'
  assert json.loads(beside.read_text())['r'] == 8  # of PEFT, on the codes
  assert json.loads(beside.read_text())['base_model_name_or_path'] == 'b'


def test_another_adapter_in_the_place_beside_is_kept(make_tuned, tmp_path):
  tuned = make_tuned()
  for _ in range(2):  # what it wrote itself may go
    packing.write_packed(tuned, tmp_path / 'b', FLOAT32)
  (tmp_path / 'b-adapter').rename(tmp_path / 'c-adapter')
  with pytest.raises(ConfigError, match='c-adapter, where'):
    packing.write_packed(tuned, tmp_path / 'c', FLOAT32)
  assert not (tmp_path / 'c').exists()
