"""Folders of every family, as transformers writes them."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.checkpoints.hf import HfModel
from jlora.checkpoints.model_folders import save_folder
from jlora.checkpoints.tokenizers import from_folder as load_tokenizer
from jlora.checkpoints.weights import load_params
from tests.decoders import (
  assert_near,
  compiled,
  make_config,
  make_oracle,
  make_params,
  stored,
)

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def test_transformers_computes_the_logits_of_a_folder_of_ours(
  leaves_config, tiny_base, tmp_path
):
  params, tokenizer = make_params(leaves_config), load_tokenizer(tiny_base)
  save_folder(tmp_path / 'ours', leaves_config, params, tokenizer)
  oracle = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'ours', attn_implementation='eager'
  )
  tokens = np.arange(24).reshape(2, 12) * 5 % 96
  with torch.no_grad():
    expected = oracle.eval()(torch.tensor(tokens)).logits.numpy()
  found = compiled(leaves_config)({'params': params}, tokens)
  assert_near(found, expected)


def test_a_folder_of_transformers_is_read(leaves_config, tmp_path):
  params = make_params(leaves_config)
  make_oracle(leaves_config, params).save_pretrained(tmp_path)
  model = HfModel(tmp_path)
  assert model.config == leaves_config
  found = stored(model.config, load_params(model))
  for name, tensor in stored(leaves_config, params).items():
    np.testing.assert_array_equal(found[name], tensor)


def test_files_of_gpt2_without_a_prefix_are_read(tmp_path):
  config = make_config('gpt2')
  params = make_params(config)
  make_oracle(config, params).save_pretrained(tmp_path)
  path = tmp_path / 'model.safetensors'
  tensors = {
    name.removeprefix('transformer.'): tensor
    for name, tensor in load_file(path).items()
  }
  tensors['h.0.attn.bias'] = np.tri(4, dtype='f4')[None, None]  # a buffer
  save_file(tensors, path, {'format': 'pt'})
  found = stored(config, load_params(HfModel(tmp_path)))
  for name, tensor in stored(config, params).items():
    np.testing.assert_array_equal(found[name], tensor)
