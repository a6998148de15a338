import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora.checkpoints.hf as hf
from jlora.checkpoints import tokenizers
from jlora.checkpoints.gguf import GgufFile
from jlora.checkpoints.llama_cpp import GgufModel
from jlora.checkpoints.model_folders import save_folder
from jlora.checkpoints.weights import load_params, stored_shapes
from jlora.core.tree import leaves_by_path
from jlora.errors import BaseModelError, CheckpointError, ConfigError
from jlora.models import layout
from jlora.models.decoder import Decoder

TOKENS = np.arange(40)[None] * 7 % 300


@pytest.fixture(scope='module')
def params(tiny_gguf):
  return load_params(GgufModel(tiny_gguf))


@pytest.fixture(scope='module')
def tokenizer(tiny_gguf):
  return tokenizers.from_gguf(GgufFile(tiny_gguf).metadata)


@pytest.fixture
def folder(tmp_path, tiny_config, params, tokenizer):
  save_folder(tmp_path / 'saved', tiny_config, params, tokenizer)
  return tmp_path / 'saved'


def logits(config, params):
  return Decoder(config).apply({'params': params}, jnp.asarray(TOKENS))


def make_llama(**fields):
  torch = pytest.importorskip('torch')
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  sizes = {
    'vocab_size': 300,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
  }
  return LlamaForCausalLM(LlamaConfig(**{**sizes, **fields})).eval()


def torch_logits(model):
  import torch

  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize('shard', ['5GB', '50KB'])
@pytest.mark.parametrize('tied', [True, False])
def test_a_folder_from_transformers_has_its_logits(shard, tied, tmp_path):
  oracle = make_llama(tie_word_embeddings=tied)
  oracle.save_pretrained(tmp_path, max_shard_size=shard)
  assert (tmp_path / 'model.safetensors.index.json').exists() == (
    shard != '5GB'
  )
  model = hf.HfModel(tmp_path)
  found = logits(model.config, load_params(model))
  np.testing.assert_allclose(found, torch_logits(oracle), atol=1e-5)


def test_bfloat16_weights_are_widened_exactly(tmp_path):
  import torch

  oracle = make_llama().to(torch.bfloat16)
  oracle.save_pretrained(tmp_path)
  model = hf.HfModel(tmp_path)
  found = load_params(model)['layers']['mlp']['down_proj']['kernel'][1]
  expected = oracle.model.layers[1].mlp.down_proj.weight.detach().float().T
  np.testing.assert_array_equal(found, expected.numpy())
  assert model.precision == 'bfloat16'


@pytest.mark.parametrize(
  ('tied', 'shard', 'files'), [(True, '50GB', 1), (False, '100KB', 5)]
)
def test_transformers_opens_what_is_saved(
  tied, shard, files, tmp_path, tokenizer
):
  from transformers import AutoModelForCausalLM, AutoTokenizer

  make_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / 'a')
  model = hf.HfModel(tmp_path / 'a')
  params = load_params(model)
  save_folder(
    tmp_path / 'b', model.config, params, tokenizer, max_shard_size=shard
  )
  assert len(list((tmp_path / 'b').glob('*.safetensors'))) == files
  oracle, info = AutoModelForCausalLM.from_pretrained(
    tmp_path / 'b', output_loading_info=True
  )
  assert not any(info.values())
  assert oracle.config.tie_word_embeddings == tied
  expected = logits(model.config, params)
  np.testing.assert_allclose(torch_logits(oracle), expected, atol=1e-5)
  loaded = AutoTokenizer.from_pretrained(tmp_path / 'b')
  assert loaded.encode('a  1\n\n2') == tokenizer.encode('a  1\n\n2')
  assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', jnp.bfloat16])
def test_16_bit_saves_round_each_value_once(
  dtype, tmp_path, tiny_config, params, tokenizer
):
  save_folder(tmp_path / 'x', tiny_config, params, tokenizer, dtype)
  reread = load_params(hf.HfModel(tmp_path / 'x'))
  for path, leaf in leaves_by_path(params).items():
    expected = leaf.astype(np.dtype(dtype)).astype('f4')
    np.testing.assert_array_equal(leaves_by_path(reread)[path], expected)


def test_leaves_may_come_as_a_stream_in_any_order(
  folder, tmp_path, tiny_config, params, tokenizer
):
  stream = reversed(leaves_by_path(params).items())
  save_folder(tmp_path / 'x', tiny_config, stream, tokenizer)
  for file in folder.iterdir():
    assert file.read_bytes() == (tmp_path / 'x' / file.name).read_bytes()


def test_a_save_replaces_an_earlier_one(folder, tiny_config, params, tokenizer):
  save_folder(
    folder, tiny_config, params, tokenizer, 'bfloat16', eos_token_ids=(2, 0)
  )
  model = hf.HfModel(folder)
  assert (model.precision, model.eos_token_ids) == ('bfloat16', (2, 0))
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_save_in_one_file_replaces_one_in_shards(
  tmp_path, tiny_config, params, tokenizer
):
  for size, count in (('100KB', 4), ('1GB', 1), ('100KB', 4)):
    save_folder(
      tmp_path / 'x', tiny_config, params, tokenizer, max_shard_size=size
    )
    model = hf.HfModel(tmp_path / 'x')
    assert len(model.paths) == count
    found = model.read('model.norm.weight', np.float32)
    np.testing.assert_array_equal(found, params['final_norm']['scale'])


def test_a_folder_of_other_things_is_not_replaced(
  folder, tiny_config, params, tokenizer
):
  (folder / 'thesis.tex').write_text('years of work')
  with pytest.raises(ConfigError, match=r'thesis\.tex'):
    save_folder(folder, tiny_config, params, tokenizer)


def test_a_failed_save_keeps_what_was_there(
  folder, tiny_config, params, tokenizer
):
  before = (folder / 'model.safetensors').read_bytes()
  stream = list(leaves_by_path(params).items())
  with pytest.raises(CheckpointError, match='would lack'):
    save_folder(folder, tiny_config, stream[:-1], tokenizer)
  with pytest.raises(CheckpointError, match='comes twice'):
    save_folder(folder, tiny_config, stream + stream[:1], tokenizer)
  assert (folder / 'model.safetensors').read_bytes() == before
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_values_that_do_not_fit_the_dtype_are_refused(
  tmp_path, tiny_config, params, tokenizer
):
  large = {**params, 'final_norm': {'scale': np.full(64, 1e30, 'f4')}}
  with pytest.raises(ConfigError, match='finite as float16'):
    save_folder(tmp_path / 'x', tiny_config, large, tokenizer, 'float16')
  with pytest.raises(ConfigError, match='int8'):
    save_folder(tmp_path / 'x', tiny_config, params, tokenizer, 'int8')
  assert not any(tmp_path.iterdir())


def edit(path, **fields):
  values = {**json.loads(path.read_text()), **fields}
  path.write_text(json.dumps(values))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model_type': 'mamba'}, "'mamba'"),
    ({'auto_map': {'AutoModel': 'x.Y'}}, 'never run'),
    ({'auto_map': {'AutoModel': 'x.LlamaX', 'AutoY': 'x.Y'}}, 'never run'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'is quantized'),
    ({'hidden_size': -64}, 'hidden_size=-64'),
    ({'hidden_size': '64'}, "hidden_size='64'"),
    ({'num_hidden_layers': 10**12}, 'num_hidden_layers=1000000000000'),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps=nan'),
    ({'num_hidden_layers': 1}, r'holds .model\.layers\.1'),
    ({'num_hidden_layers': 3}, r'lacks .model\.layers\.2'),
    ({'intermediate_size': 95}, r'shape \(96, 64\)'),
  ],
)
def test_a_config_that_cannot_be_right_is_refused(folder, fields, message):
  edit(folder / 'config.json', **fields)
  with pytest.raises(BaseModelError, match=message):
    hf.HfModel(folder)


def change_tensors(folder, **tensors):
  path = folder / 'model.safetensors'
  save_file({**load_file(path), **tensors}, path)


def test_a_tied_head_may_be_saved_if_it_is_the_embedding(folder, params):
  embedding = params['embed']['embedding']
  change_tensors(folder, **{'lm_head.weight': embedding})
  assert hf.HfModel(folder).config.tie_embeddings
  change_tensors(folder, **{'lm_head.weight': embedding + 1})
  with pytest.raises(BaseModelError, match='output head that differs'):
    hf.HfModel(folder)


def test_an_infinite_value_is_refused_with_its_tensor(folder):
  norm = np.full(64, np.inf, 'f4')
  change_tensors(folder, **{'model.norm.weight': norm})
  with pytest.raises(BaseModelError, match=r'model\.norm\.weight holds 64'):
    load_params(hf.HfModel(folder))


def test_the_place_of_a_leaf_is_what_stays_in_the_tree(folder, tiny_config):
  seen = []

  def place(path, leaf):
    seen.append((path, leaf.shape))
    return path

  tree = load_params(hf.HfModel(folder), place=place)
  assert tree['layers']['mlp']['up_proj']['kernel'] == (
    'layers/mlp/up_proj/kernel'
  )
  assert seen == [(w.path, w.shape) for w in layout.weights(tiny_config)]


def test_stored_shapes_are_those_of_transformers(tiny_config):
  state = make_llama(head_dim=16, tie_word_embeddings=True).state_dict()
  state.pop('lm_head.weight')  # the embedding under its second name
  assert {k: tuple(v.shape) for k, v in state.items()} == stored_shapes(
    tiny_config
  )
