import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints.gguf_layout import rotary_rows
from jlora.checkpoints.llama_cpp import GgufModel
from jlora.checkpoints.weights import load_params
from jlora.errors import BaseModelError
from jlora.models import rotary
from jlora.models.decoder import Decoder
from jlora.models.rope_scaling import Llama3Scaling


@pytest.mark.parametrize('kind', ['F32', 'Q8_0'])
def test_logits_equal_those_of_transformers(kind, write_gguf, tmp_path):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  write_gguf(tmp_path / 'tiny.gguf', kind)
  model = GgufModel(tmp_path / 'tiny.gguf')
  tokens = np.arange(40)[None] * 7 % 300
  found = Decoder(model.config).apply(
    {'params': load_params(model)}, jnp.asarray(tokens)
  )
  oracle = AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file='tiny.gguf', dtype=torch.float32
  )
  with torch.no_grad():
    expected = oracle(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_config_is_read_from_the_metadata(tiny_gguf, tiny_config):
  assert GgufModel(tiny_gguf).config == tiny_config


def test_an_output_tensor_unties_the_head(write_gguf, tmp_path, tiny_config):
  head = np.ones((tiny_config.vocab_size, tiny_config.embed_dim), 'f4')
  tensors = {'output.weight': head}
  model = GgufModel(write_gguf(tmp_path / 'x.gguf', tensors=tensors))
  assert not model.config.tie_embeddings
  assert load_params(model)['lm_head']['kernel'].shape == head.T.shape


def test_rows_of_a_rotary_pair_come_apart():
  rows = np.array([0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15])
  found = rows[rotary_rows(12, heads=2)]
  assert found.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]


def test_the_stretch_of_llama_3_is_recognized(
  write_gguf, tmp_path, tiny_config
):
  scaling = Llama3Scaling(factor=8.0)
  scaled = dataclasses.replace(tiny_config, rope_scaling=scaling)
  factors = rotary.frequencies(tiny_config) / rotary.frequencies(scaled)
  path = tmp_path / 'x.gguf'
  tensors = {'rope_freqs.weight': factors}
  assert GgufModel(write_gguf(path, tensors=tensors)).config == scaled
  tensors = {'rope_freqs.weight': factors**2}
  with pytest.raises(BaseModelError, match='stretches the rotary'):
    GgufModel(write_gguf(path, tensors=tensors))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tensors': {'blk.1.attn_q.weight': None}}, 'lacks .blk.1.attn_q'),
    ({'tensors': {'blk.0.attn_v.bias': np.ones(64, 'f4')}}, 'holds .*bias'),
    (
      {'tensors': {'blk.0.attn_q.weight': np.ones((64, 32), 'f4')}},
      r'shape \(64, 32\)',
    ),
    ({'tensors': {'token_embd.weight': None}}, 'token_embd'),
    ({'keys': {'block_count': 2**31}}, 'num_hidden_layers=2147483648'),
    ({'keys': {'attention.head_count': 0}}, 'num_attention_heads=0'),
    ({'keys': {'attention.head_count_kv': 3}}, 'do not divide'),
    ({'keys': {'expert_count': 8}}, 'llama.expert_used_count'),
    (
      {'keys': {'expert_count': 8, 'expert_used_count': 2}},
      'lacks .*ffn_gate_exps',
    ),
    ({'keys': {'rope.dimension_count': 8}}, 'rope.dimension_count=8'),
  ],
)
def test_another_model_than_announced_is_refused(
  write_gguf, tmp_path, changes, message
):
  path = write_gguf(tmp_path / 'x.gguf', **changes)
  with pytest.raises(BaseModelError, match=message):
    GgufModel(path)


def test_a_window_that_llama_cpp_leaves_out_is_said(
  write_gguf, tmp_path, tiny_config
):
  keys = {'attention.sliding_window': 32}
  path = write_gguf(tmp_path / 'x.gguf', keys=keys)
  with pytest.warns(UserWarning, match='sliding_window=32, which llama.cpp'):
    assert GgufModel(path).config == tiny_config


def test_a_part_of_a_model_is_refused_with_how_to_join_them(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'x.gguf', 'llama')
  writer.add_uint16('split.count', 3)
  for step in ('header', 'kv_data', 'tensors'):
    getattr(writer, f'write_{step}_to_file')()
  writer.close()
  with pytest.raises(BaseModelError, match=r'one of 3 parts.*--merge'):
    GgufModel(tmp_path / 'x.gguf')


def test_another_architecture_is_refused(write_gguf, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf')
  data = path.read_bytes()
  path.write_bytes(
    data.replace(b'\x05\0\0\0\0\0\0\0llama', b'\x05\0\0\0\0\0\0\0gemma', 1)
  )
  with pytest.raises(BaseModelError, match="'gemma'"):
    GgufModel(path)


def test_a_nan_is_refused_with_the_name_of_its_tensor(write_gguf, tmp_path):
  bad = np.ones(64, 'f4')
  bad[3] = np.nan
  tensors = {'blk.1.ffn_norm.weight': bad}
  model = GgufModel(write_gguf(tmp_path / 'x.gguf', tensors=tensors))
  with pytest.raises(BaseModelError, match=r'layers\.1\.post_attention'):
    load_params(model)
