"""GGUF files of families beside Llama's."""

import gguf
import numpy as np
import pytest

from jlora.checkpoints.llama_cpp import GgufModel
from jlora.checkpoints.weights import load_params
from jlora.errors import BaseModelError
from jlora.models.config import DecoderConfig
from tests.decoders import make_params, stored

SIZES = {
  'vocab_size': 96,
  'embed_dim': 64,
  'mlp_dim': 96,
  'layers': 4,
  'heads': 4,
  'kv_heads': 2,
  'head_dim': 16,
  'max_positions': 128,
  'norm_eps': 1e-6,
}
CONFIGS = {
  'qwen2': {'biases': ('q_proj', 'k_proj', 'v_proj')},
  'qwen3': {'qk_norm': True},
  'smollm3': {'unrotated_layers': (3,)},
}


def make_config(family):
  return DecoderConfig(family=family, **SIZES | CONFIGS[family])


def write(path, config, tensors):
  """Writes a model as llama.cpp's converter does."""
  name = config.family
  writer = gguf.GGUFWriter(path, name)
  for key, value in {
    'vocab_size': config.vocab_size,
    'block_count': config.layers,
    'context_length': config.max_positions,
    'embedding_length': config.embed_dim,
    'feed_forward_length': config.mlp_dim,
    'attention.head_count': config.heads,
    'attention.head_count_kv': config.kv_heads,
    'attention.key_length': config.head_dim,
  }.items():
    writer.add_uint32(f'{name}.{key}', value)
  key = f'{name}.attention.layer_norm_rms_epsilon'
  writer.add_float32(key, config.norm_eps)
  writer.add_float32(f'{name}.rope.freq_base', config.rope_theta)
  arch = gguf.MODEL_ARCH[name.upper()]
  names = gguf.get_tensor_name_map(arch, config.layers)
  for hf, tensor in tensors.items():
    if name == 'smollm3':  # as Llama's
      for part, heads in (('q', config.heads), ('k', config.kv_heads)):
        if f'.{part}_proj.' in hf:
          split = tensor.reshape(heads, 2, -1, tensor.shape[1])
          tensor = split.swapaxes(1, 2).reshape(tensor.shape)
    writer.add_tensor(
      names.get_name(hf, try_suffixes=('.weight', '.bias')),
      np.ascontiguousarray(tensor),
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize('family', CONFIGS)
def test_what_was_written_is_read(family, tmp_path):
  config = make_config(family)
  tensors = stored(config, make_params(config))
  model = GgufModel(write(tmp_path / 'x.gguf', config, tensors))
  assert model.config == config
  found = stored(config, load_params(model))
  assert found.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(found[name], tensor)


def test_a_missing_bias_is_named(tmp_path):
  config = make_config('qwen2')
  tensors = stored(config, make_params(config))
  del tensors['model.layers.1.self_attn.k_proj.bias']
  path = write(tmp_path / 'x.gguf', config, tensors)
  with pytest.raises(BaseModelError, match=r'lacks .blk.1.attn_k.bias'):
    GgufModel(path)
