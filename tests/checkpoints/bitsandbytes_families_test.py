"""Folders in 4 bits of every family, both ways."""

import dataclasses

import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import Base, open_base
from jlora.checkpoints.hf import HfModel
from jlora.checkpoints.model_folders import save_folder
from jlora.checkpoints.packed_folders import choose_packed, save_packed
from jlora.checkpoints.placement import load_frozen
from jlora.core.quantized import is_quantized
from jlora.core.tree import leaves_by_path, nest
from jlora.errors import ConfigError
from jlora.models import families, layout
from tests.checkpoints.packing_4bit import (
  decode,
  load_file,
  torch,
  write_packed,
)
from tests.decoders import ROWS, make_config, make_oracle, make_params, stored

transformers = pytest.importorskip('transformers')
bnb = pytest.importorskip('bitsandbytes')

FAMILIES = list(dict.fromkeys(name.split()[0] for name in ROWS))
MOE = ('mixtral', 'qwen3_moe')


def wide(family):
  """A row's decoder with kernels of which all but o_proj have whole blocks."""
  config = make_config(family)
  sizes = {'embed_dim': 64, 'mlp_dim': 128, 'layers': 2}
  if family == 'gpt2':
    sizes['head_dim'] = 16  # there it is embed / heads
  return dataclasses.replace(config, **sizes)


def turned(config, name, tensor):
  """GPT-2 stores kernels as [in, out], but never in 4 bits."""
  is_kernel = '.h.' in name and tensor.ndim == 2
  return tensor.T if config.family == 'gpt2' and is_kernel else tensor


@pytest.fixture(params=[f for f in FAMILIES if f not in MOE])
def config(request):
  return wide(request.param)


def test_what_transformers_quantized_is_read_as_it_is(config, tmp_path):
  make_oracle(config, make_params(config)).save_pretrained(tmp_path / 'a')
  quant = transformers.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type='nf4',
    bnb_4bit_use_double_quant=True,
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'a', quantization_config=quant, dtype=torch.float32
  )
  model.save_pretrained(tmp_path / 'b')
  tensors = load_file(tmp_path / 'b' / 'model.safetensors')
  base = Base('b', HfModel(tmp_path / 'b'))
  quant = families.resolve(base.codes.quant, config)
  frozen = load_frozen(base, quant, np.float32)
  found = stored(config, jlora.dequantize(frozen))
  packed = 0
  for name, tensor in found.items():
    expected = tensors[name].numpy()
    if f'{name}.absmax' in tensors:
      expected = turned(config, name, decode(tensors, name))
      packed += 1
    np.testing.assert_array_equal(tensor, expected)
  linear = sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
  assert packed == linear
  kept = len(base.codes.leaves)
  assert kept == len(base.codes.leaves | base.codes.decoded) - (
    config.heads * config.head_dim % 64 > 0
  )


def test_transformers_reads_the_codes_that_are_written(
  config, tiny_base, tmp_path
):
  params = make_params(config)
  quant = families.resolve(jlora.QuantSpec(), config)
  leaves = leaves_by_path(jlora.quantize(params, quant), is_quantized)
  codes = {path: x for path, x in leaves.items() if is_quantized(x)}
  packed = choose_packed(config, codes)
  dense = {p: x for p, x in leaves_by_path(params).items() if p not in packed}
  tokenizer = open_base(str(tiny_base)).tokenizer
  save_packed(
    tmp_path / 'b', config, packed, dense.items(), tokenizer, 'float32'
  )
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'b', output_loading_info=True
  )
  assert not any(info.values())
  decoded = jlora.dequantize({**leaves, **dense} | packed)
  expected = stored(config, {k: decoded[k] for k in leaves_by_path(params)})
  state = model.dequantize().state_dict()
  for name, tensor in expected.items():
    tensor = turned(config, name, tensor)
    np.testing.assert_array_equal(state[name].numpy(), tensor)


@pytest.mark.parametrize('family', MOE)
def test_experts_in_codes_have_no_form_in_bitsandbytes(family):
  config = wide(family)
  quant = families.resolve(jlora.QuantSpec(), config)
  shapes = nest(layout.shapes(config))
  leaves = leaves_by_path(jlora.quantize(shapes, quant), is_quantized)
  codes = {path: x for path, x in leaves.items() if is_quantized(x)}
  with pytest.raises(ConfigError, match=r'experts/.* no form'):
    choose_packed(config, codes)


@pytest.mark.parametrize('family', MOE)
def test_experts_with_codes_of_their_own_stay_as_they_are(
  family, tiny_base, tmp_path
):
  config = wide(family)
  tokenizer = open_base(str(tiny_base)).tokenizer
  save_folder(tmp_path / 'a', config, make_params(config), tokenizer)

  def choose(name):
    return {} if '.experts.' in name else None

  tensors = write_packed(tmp_path / 'a', tmp_path / 'b', choose)
  base = open_base(str(tmp_path / 'b'))
  assert not base.codes.decoded
  assert len(base.codes.leaves) == 3
  quant = families.resolve(base.codes.quant, config)
  found = stored(config, jlora.dequantize(load_frozen(base, quant, np.float32)))
  for name, tensor in found.items():
    packed = f'{name}.absmax' in tensors
    expected = decode(tensors, name) if packed else tensors[name].numpy()
    np.testing.assert_array_equal(tensor, expected)
