import json

import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.placement import load_frozen
from jlora.checkpoints.stored_codes import agree
from jlora.core.tree import leaves_by_path
from jlora.errors import BaseModelError, ConfigError
from jlora.models import families
from tests.checkpoints.packing_4bit import (
  decode,
  is_linear,
  save_file,
  torch,
  write_packed,
)
from tests.decoders import stored

KINDS = {
  'nf4': {},
  'fp4': {'quant_type': 'fp4'},
  'single': {'compress_statistics': False},
  'blocks of 32': {'blocksize': 32},
  'bf16 storage': {'quant_storage': torch.bfloat16},
  'f32 storage': {'quant_storage': torch.float32, 'blocksize': 32},
}
UP = 'model.layers.1.mlp.up_proj.weight'


def spec_of(base):
  return families.resolve(base.codes.quant, base.config)


@pytest.mark.parametrize('changes', KINDS.values(), ids=KINDS)
def test_codes_stay_as_bitsandbytes_stored_them(tiny_base, tmp_path, changes):
  tensors = write_packed(tiny_base, tmp_path / 'b', **changes)
  base = open_base(str(tmp_path / 'b'))
  frozen = load_frozen(base, spec_of(base), np.float32)
  kernel = frozen['layers']['mlp']['up_proj']['kernel']
  packed = tensors[UP].view(torch.uint8).numpy().reshape(128, 32)
  np.testing.assert_array_equal(kernel.codes[1], packed.T)
  absmax = tensors[f'{UP}.absmax'].numpy().reshape(128, -1)
  np.testing.assert_array_equal(kernel.scales[1], absmax.T)
  if changes.get('compress_statistics', True):
    nested = tensors[f'{UP}.nested_absmax'].numpy()
    np.testing.assert_array_equal(kernel.scales2[1], nested)
  dense = stored(base.config, jlora.dequantize(frozen))
  for name in filter(is_linear, dense):
    np.testing.assert_array_equal(dense[name], decode(tensors, name))


def test_decoded_weights_are_those_of_the_codes(tiny_base, tmp_path):
  tensors = write_packed(tiny_base, tmp_path / 'b', blocksize=128)
  base = open_base(str(tmp_path / 'b'))
  dense = stored(base.config, base.load_params())
  for name in filter(is_linear, dense):
    np.testing.assert_array_equal(dense[name], decode(tensors, name))
  index = (slice(3, 20), slice(5, 40))
  part = base.model.read(UP, np.float32, index)
  np.testing.assert_array_equal(part, dense[UP][index])


def test_what_cannot_stay_as_stored_is_decoded_counted_and_said(
  tiny_base, tmp_path
):
  def choose(name):
    if not is_linear(name) or name == UP:
      return None
    if 'v_proj' in name:
      return {'quant_type': 'fp4'}
    return {'blocksize': 128} if 'o_proj' in name else {}

  tensors = write_packed(tiny_base, tmp_path / 'b', choose)
  base = open_base(str(tmp_path / 'b'))
  assert base.codes.decoded.keys() == {
    'layers/mlp/up_proj/kernel',
    'layers/attention/v_proj/kernel',
    'layers/attention/o_proj/kernel',
  }
  text = base.codes.describe(spec_of(base))
  assert text.startswith('stored in 4 bits: 7 leaves, 4 of them used as')
  assert '1, since blocks of 128 do not divide rows of 64' in text
  assert '1, since some of their layers are in full precision' in text
  assert '1, since most others are nf4' in text
  frozen = load_frozen(base, spec_of(base), np.float32)
  dense = stored(base.config, jlora.dequantize(frozen))
  for name, tensor in dense.items():
    packed = f'{name}.absmax' in tensors
    wanted = decode(tensors, name) if packed else tensors[name].numpy()
    np.testing.assert_array_equal(tensor, wanted)


def test_levels_of_another_table_are_decoded_by_it(tiny_base, tmp_path):
  tensors = write_packed(tiny_base, tmp_path / 'b')
  tensors[f'{UP}.quant_map'] *= 0.5
  save_file(tensors, tmp_path / 'b' / 'model.safetensors')
  base = open_base(str(tmp_path / 'b'))
  assert base.codes.decoded == {
    'layers/mlp/up_proj/kernel': 'their codes have levels of their own'
  }
  found = base.model.read(UP, np.float32)
  np.testing.assert_array_equal(found, decode(tensors, UP))


def test_pieces_on_several_devices_are_those_of_one(tiny_base, tmp_path):
  write_packed(tiny_base, tmp_path / 'b')
  leaf = open_base(str(tmp_path / 'b')).codes.leaves
  leaf = leaf['layers/mlp/down_proj/kernel']
  whole = leaf.blocks((slice(0, 2), slice(0, 2), slice(0, 64)))
  part = leaf.blocks((slice(1, 2), slice(1, 2), slice(16, 48)))
  np.testing.assert_array_equal(part[0], whole[0][1:, 32:, 16:48])
  np.testing.assert_array_equal(part[1], whole[1][1:, 1:, 16:48])


@pytest.fixture(scope='module')
def packed_base(tiny_base, tmp_path_factory):
  folder = tmp_path_factory.mktemp('packed') / 'b'
  write_packed(tiny_base, folder)
  return open_base(str(folder))


@pytest.mark.parametrize(
  ('quant', 'lora', 'message'),
  [
    ({'format': 'fp4'}, {}, r'fp4 .* stored as nf4 .*quant.format=nf4'),
    ({'double_quant': False}, {}, 'config.quant.double_quant=True'),
    ({'block_size': 32}, {}, 'config.quant.block_size=64'),
    ({'targets': '.*/embedding'}, {}, "'embed/embedding' in 4 bits"),
    ({}, {'init': 'pissa'}, "'pissa' takes a part out"),
  ],
)
def test_codes_are_not_quantized_again(packed_base, quant, lora, message):
  spec = jlora.LoraSpec(**lora)
  quant = jlora.QuantSpec(**quant)
  with pytest.raises(ConfigError, match=message):
    agree(quant, packed_base.codes, packed_base.config, spec)


def test_leaves_are_left_out_of_the_codes_by_name(packed_base):
  base, up = packed_base, 'layers/mlp/up_proj/kernel'
  quant = jlora.QuantSpec(exclude=(up,))
  for asked, spec in (
    (quant, None),
    (jlora.QuantSpec(), jlora.LoraSpec(targets=(), train_full=up)),
  ):
    agreed = agree(asked, base.codes, base.config, spec)
    assert len(agreed.targets) == 6
    assert agree(agreed, base.codes, base.config, spec) == agreed
    assert base.codes.describe(agreed).endswith('1, since quant says so')
  assert agree(None, base.codes, base.config) is None
  assert '7, since quant is None' in base.codes.describe(None)


def damage_state(tensors, **changes):
  name = f'{UP}.quant_state.bitsandbytes__nf4'
  fields = json.loads(tensors[name].numpy().tobytes()) | changes
  content = json.dumps(fields).encode()
  tensors[name] = torch.tensor(list(content), dtype=torch.uint8)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda t: t.pop(f'{UP}.absmax'), r'absmax is 0 of nothing.* 128 of U8'),
    (lambda t: t.pop(f'{UP}.nested_quant_map'), 'asks for 256 of F32'),
    (lambda t: t.update({UP: t[UP][1:]}), '4095 bytes of U8.* 4096'),
    (lambda t: t.pop(UP), '0 bytes of nothing'),
    (lambda t: t.pop(f'{UP}.quant_state.bitsandbytes__nf4'), 'dtype U8'),
    (lambda t: damage_state(t, shape=[64, 128]), r'has shape \(64, 128\)'),
    (lambda t: damage_state(t, shape=[1 << 40, 128]), 'asks for'),
    (lambda t: damage_state(t, blocksize=0), 'blocksize=0'),
    (lambda t: damage_state(t, quant_type='nf5'), "quant_type='nf5'"),
    (lambda t: damage_state(t, nested_blocksize=128), 'nested_blocksize=128'),
    (lambda t: damage_state(t, nested_offset=float('nan')), 'nested_offset'),
    (lambda t: t.update({f'{UP}.SCB': torch.ones(128)}), '8 bits'),
  ],
)
def test_a_damaged_weight_is_refused(tiny_base, tmp_path, damage, message):
  tensors = write_packed(tiny_base, tmp_path / 'b')
  damage(tensors)
  save_file(tensors, tmp_path / 'b' / 'model.safetensors')
  with pytest.raises(BaseModelError, match=message) as caught:
    open_base(str(tmp_path / 'b'))
  assert '\n' not in str(caught.value)


def test_scales_that_are_not_finite_are_refused(tiny_base, tmp_path):
  tensors = write_packed(tiny_base, tmp_path / 'b')
  tensors[f'{UP}.nested_absmax'][0] = float('nan')
  save_file(tensors, tmp_path / 'b' / 'model.safetensors')
  base = open_base(str(tmp_path / 'b'))
  with pytest.raises(BaseModelError, match=r'up_proj.* NaN'):
    load_frozen(base, spec_of(base), np.float32)
  with pytest.raises(BaseModelError, match=r'up_proj.* NaN'):
    base.load_params()


@pytest.mark.parametrize(
  ('quantization', 'message'),
  [
    ({'load_in_8bit': True}, '8 bits by bitsandbytes.*unquantized'),
    ({'quant_method': 'gptq', 'bits': 4}, 'gptq.*let jlora quantize'),
    ('awq', 'awq'),
  ],
)
def test_other_quantizations_are_refused_by_name(
  tiny_base, tmp_path, quantization, message
):
  write_packed(tiny_base, tmp_path / 'b')
  path = tmp_path / 'b' / 'config.json'
  fields = json.loads(path.read_text()) | {'quantization_config': quantization}
  path.write_text(json.dumps(fields))
  with pytest.raises(BaseModelError, match=message):
    open_base(str(tmp_path / 'b'))


def test_a_base_without_an_adapter_computes_with_its_codes(packed_base):
  from jlora.inference.tuned import load_tuned

  tuned = load_tuned(packed_base.name)
  leaves = leaves_by_path(tuned.frozen, jlora.core.quantized.is_quantized)
  assert sum(isinstance(x, jlora.QuantizedArray) for x in leaves.values()) == 7
  decoded = packed_base.load_params()
  jax.tree.map(np.testing.assert_array_equal, tuned.dense('float32'), decoded)
