import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.peft import save_adapter
from jlora.checkpoints.placement import load_frozen, load_split
from jlora.checkpoints.stored_codes import agree
from jlora.core.quantized import is_quantized
from jlora.core.tree import leaves_by_path
from jlora.errors import BaseModelError, ConfigError
from jlora.inference.tuned import load_tuned
from jlora.models import families
from jlora.planning.sizes import read_sizes
from jlora.training.requirements import as_stored
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
  assert base.codes.mixed == 2 * 64 * 128
  assert 'GiB in 16 bits' in text
  assert 'the plain -bnb-4bit one' in text
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


def test_a_part_of_the_blocks_is_read_as_that_part(tiny_base, tmp_path):
  write_packed(tiny_base, tmp_path / 'b')
  leaf = open_base(str(tmp_path / 'b')).codes.leaves
  leaf = leaf['layers/mlp/down_proj/kernel']
  whole = leaf.blocks((slice(0, 2), slice(0, 2), slice(0, 64)))
  part = leaf.blocks((slice(1, 2), slice(1, 2), slice(16, 48)))
  np.testing.assert_array_equal(part[0], whole[0][1:, 32:, 16:48])
  np.testing.assert_array_equal(part[1], whole[1][1:, 1:, 16:48])


ON_A_MESH = """
import sys
import jax
import numpy as np
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.placement import load_split
from jlora.core.tree import arrays_by_path
from jlora.core.plan import is_frozen_leaf
from jlora.inference.tuned import load_tuned
from jlora.models import families
from jlora.planning.sizes import read_sizes
from jlora.parallel.mesh import make_mesh
from jlora.parallel.shardings import make_shardings

base = open_base(sys.argv[1])
quant = families.resolve(base.codes.quant, base.config)
args = jax.random.key(0), base, None, quant, np.float32
one = load_split(*args)[0]
leaves = arrays_by_path(one, is_frozen_leaf)
cuts = make_shardings(leaves, families.SHARDING, make_mesh(1, 2, 2))
many = load_split(*args, shardings=cuts)[0]
jax.tree.map(np.testing.assert_array_equal, one, many)
up = many['layers']['mlp']['up_proj']['kernel']
assert up.codes.sharding.spec[1:] == ('fsdp', 'tensor'), up.codes.sharding
assert up.codes.addressable_shards[0].data.shape == (2, 16, 64)
"""


def test_codes_cut_over_a_mesh_are_those_of_one_device(tiny_base, tmp_path):
  write_packed(tiny_base, tmp_path / 'b', blocksize=32)
  flags = '--xla_force_host_platform_device_count=4'
  ended = subprocess.run(
    [sys.executable, '-c', ON_A_MESH, str(tmp_path / 'b')],
    env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr


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
    ({}, {'init': 'pissa'}, "'pissa' takes a part out.*lora.init=lora"),
  ],
)
def test_codes_are_not_quantized_again(packed_base, quant, lora, message):
  spec = jlora.LoraSpec(**lora)
  quant = jlora.QuantSpec(**quant)
  run = types.SimpleNamespace(quant=quant, lora=spec)
  with pytest.raises(ConfigError, match=message):
    as_stored(run, packed_base)
  with pytest.raises(ConfigError, match=r'^[^;]*$'):  # no flags of training
    agree(quant, packed_base.codes, packed_base.config, spec)


def test_layers_left_out_one_by_one_get_the_same_answer(packed_base, tiny_base):
  one = jlora.QuantSpec(exclude=('layers/1/mlp/up_proj/kernel',))
  each = jlora.QuantSpec(exclude=(r'layers/\d/mlp/up_proj/kernel',))
  found = []
  for base in (packed_base, open_base(str(tiny_base))):
    quant = families.resolve(one, base.config)
    with pytest.raises(ConfigError, match='leave 1 of the 2 layers') as raised:
      load_frozen(base, quant, 'f4')
    found.append(str(raised.value))
  assert found[0] == found[1]
  agreed = agree(each, packed_base.codes, packed_base.config)
  assert len(agreed.targets) == 6


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
  tuned = load_tuned(packed_base.name)
  leaves = leaves_by_path(tuned.frozen, is_quantized)
  assert sum(map(is_quantized, leaves.values())) == 7
  decoded = packed_base.load_params()
  jax.tree.map(np.testing.assert_array_equal, tuned.dense('float32'), decoded)


def test_an_adapter_of_peft_stands_on_the_codes_of_its_base(
  packed_base, tmp_path
):
  base = packed_base
  spec = families.resolve(jlora.LoraSpec(rank=4), base.config)
  key = jax.random.key(0)
  _, trainable, _ = load_split(key, base, spec, None, np.float32)
  config = base.config
  save_adapter(
    tmp_path / 'a', trainable, spec, config, base_name=base.name, metadata={}
  )
  (tmp_path / 'a' / 'jlora_metadata.json').unlink()
  with pytest.warns(UserWarning, match='not known to belong'):
    tuned = load_tuned(base.name, tmp_path / 'a')
  leaves = leaves_by_path(tuned.frozen, is_quantized)
  assert sum(map(is_quantized, leaves.values())) == 7


def test_the_sizes_of_a_folder_in_4_bits_can_be_planned(packed_base):
  assert read_sizes(packed_base.name) == packed_base.config
