import dataclasses
import warnings

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jlora.checkpoints.bases import open_base
from jlora.checkpoints.gguf_writer import plan_gguf, save_gguf
from jlora.checkpoints.llama_cpp import GgufModel
from jlora.checkpoints.weights import load_params, stored_shapes
from jlora.core.tree import leaves_by_path
from jlora.errors import CheckpointError, ConfigError
from jlora.models.decoder import Decoder
from tests.decoders import (
  CONFIG,
  MOE,
  PHI,
  ROWS,
  assert_near,
  make_params,
  stored,
)

# Rows of the table of families that GGUF cannot express, and why.
REFUSED = {
  'llama dynamic': 'rope_scaling=Dyn',
  'mistral': 'sliding_window=7',
  'qwen2 windows': 'sliding_window=7',
  'qwen3 biases': 'biases=',
  'qwen3 windows': 'sliding_window=7',
  'smollm3': r'unrotated_layers=\(1,\)',
  'smollm3 windows': 'sliding_window=7',
  'mixtral': 'sliding_window=7',
  'qwen3_moe': 'normalize_experts=False',
  'qwen3_moe untied': 'biases=',
  'gemma2': 'query_scalar=10',
  'gemma3_text': 'query_scalar=10',
  'gemma3_text whole': 'query_scalar=10',
}
# Rows of its own: what GGUF can express of those families.
OWN = {
  'gemma2 scaled by width': {**ROWS['gemma2'], 'query_scalar': 12},
  'gemma3_text scaled by width': {**ROWS['gemma3_text'], 'query_scalar': 12},
  'gemma3_text all whole': {**ROWS['gemma3_text whole'], 'query_scalar': 12},
  'gpt2 of usual width': {
    **ROWS['gpt2'],
    'mlp_dim': 128,
    'max_positions': 1024,
  },
  'gpt2 untied': {**ROWS['gpt2'], 'tie_embeddings': False},
  'mixtral whole': MOE,
  'qwen3_moe normalized': {**MOE, 'qk_norm': True},
  'smollm3 every fourth': {
    'unrotated_layers': (3,),
    'layers': 4,
    'head_dim': 8,
  },
}
WRITTEN = [*(row for row in ROWS if row not in REFUSED), *OWN]
# Of these, transformers knows everything: it takes some sizes for given.
GEMMA = {'head_dim': 256, 'query_scalar': 256, 'heads': 2, 'kv_heads': 1}
READ_BY_TRANSFORMERS = {
  'llama': ROWS['llama untied'],
  'qwen2': ROWS['qwen2'],
  'qwen3': {**ROWS['qwen3'], 'head_dim': 128},
  'qwen3_moe': {**OWN['qwen3_moe normalized'], 'mlp_dim': 768},
  'phi3': PHI,
  'gemma2': {
    **ROWS['gemma2'],
    **GEMMA,
    'attention_cap': 50.0,
    'logit_cap': 30.0,
  },
  'gemma3_text': {
    **ROWS['gemma3_text'],
    **GEMMA,
    'layers': 6,
    'local_layers': (0, 1, 2, 3, 4),
    'local_rope_theta': 1e4,
    'rope_scaling': None,
  },
  'gpt2': OWN['gpt2 of usual width'],
}


def config_of(row):
  fields = {**ROWS, **OWN}[row]
  return dataclasses.replace(CONFIG, family=row.split()[0], **fields)


@pytest.fixture(scope='module')
def tokenizer():
  """Byte-level BPE of as many tokens as the small decoders have rows."""
  import transformers

  tokens = ['<s>', '</s>', *'abcdefghijklmnopqrstuvwxyz', 'Ġ', 'th', 'the']
  backend = Tokenizer(
    models.BPE({t: i for i, t in enumerate(tokens)}, [('t', 'h'), ('th', 'e')])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token='<s>',
    eos_token='</s>',
    pad_token='</s>',
  )


@pytest.fixture(scope='module')
def written(tokenizer, tmp_path_factory):
  """Returns a function that writes a row of the table, each file once."""
  folder, files = tmp_path_factory.mktemp('gguf'), {}

  def write(row, kind='F32'):
    path = folder / f'{row} {kind}.gguf'
    if path not in files:
      with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        plan = plan_gguf(config_of(row), tokenizer, kind, eos_token_ids=(1, 5))
      assert bool(said) == (row == 'phi3')  # has a window
      files[path] = make_params(plan.config)
      save_gguf(path, plan, files[path])
    return path, files[path]

  return write


@pytest.mark.parametrize('row', WRITTEN)
def test_what_is_read_again_is_what_was_written(row, written):
  path, params = written(row)
  model = GgufModel(path)
  assert dataclasses.replace(model.config, family=row.split()[0]) == config_of(
    row
  )
  found = leaves_by_path(load_params(model))
  expected = leaves_by_path(params)
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    if model.config.norm == 'rms_plus_one' and name.endswith('scale'):
      leaf = (leaf + np.float32(1)) - np.float32(1)
    np.testing.assert_array_equal(found[name], leaf)


@pytest.mark.parametrize(
  'row', ['llama biases', 'gpt2', 'mixtral whole', 'gemma2 scaled by width']
)
def test_a_part_of_a_tensor_is_that_of_the_whole(row, written):
  model, rng = GgufModel(written(row)[0]), np.random.default_rng(0)
  for name, shape in stored_shapes(model.config).items():
    whole = model.read(name, np.float16)
    assert (whole.shape, whole.dtype) == (shape, np.float16)
    ends = (sorted(rng.integers(0, size + 1, 2)) for size in shape)
    index = tuple(slice(*pair) for pair in ends)
    part = model.read(name, np.float16, index)
    np.testing.assert_array_equal(part, whole[index])


@pytest.mark.parametrize('row', REFUSED)
def test_what_gguf_cannot_express_is_refused_by_name(row, tokenizer):
  with pytest.raises(ConfigError, match=REFUSED[row]):
    plan_gguf(config_of(row), tokenizer)


@pytest.mark.parametrize('family', READ_BY_TRANSFORMERS)
def test_transformers_computes_the_same_logits(
  family, tokenizer, quick_jit, tmp_path
):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  config = dataclasses.replace(
    CONFIG, family=family, **READ_BY_TRANSFORMERS[family]
  )
  params = make_params(config)
  save_gguf(tmp_path / 'x.gguf', plan_gguf(config, tokenizer, 'F32'), params)
  tokens = np.arange(40)[None] * 7 % config.vocab_size
  apply = quick_jit(Decoder(config).apply)
  found = apply({'params': params}, jnp.asarray(tokens))
  oracle = AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file='x.gguf', dtype=torch.float32
  )
  with torch.no_grad():
    expected = oracle(torch.tensor(tokens)).logits.numpy()
  assert_near(np.asarray(found), expected)


def test_every_layer_without_rotation_is_known_by_its_place(tokenizer):
  sizes = dataclasses.replace(config_of('smollm3'), layers=8)
  plan_gguf(dataclasses.replace(sizes, unrotated_layers=(3, 7)), tokenizer)
  with pytest.raises(ConfigError, match='unrotated_layers'):
    plan_gguf(dataclasses.replace(sizes, unrotated_layers=(3,)), tokenizer)


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0'])
def test_each_weight_is_rounded_as_by_the_package(kind, written):
  path, params = written('llama', kind)
  found = GgufModel(path)
  for name, tensor in stored(config_of('llama'), params).items():
    own = gguf.GGMLQuantizationType[kind]
    if tensor.ndim < 2:
      own = gguf.GGMLQuantizationType.F32
    elif kind == 'Q8_0' and tensor.shape[-1] % 32:
      own = gguf.GGMLQuantizationType.F16
    rounded = gguf.quants.quantize(np.ascontiguousarray(tensor), own)
    expected = gguf.quants.dequantize(rounded, own).reshape(tensor.shape)
    np.testing.assert_array_equal(found.read(name, np.float32), expected)
    assert found.file.tensors[found._layout.places[name].tensor].kind is own


@pytest.mark.parametrize(
  ('row', 'name'),
  [
    ('gpt2', 'position_embd.weight'),
    ('mixtral whole', 'blk.1.ffn_gate_inp.weight'),
  ],
)
def test_routers_and_positions_stay_exact(row, name, tokenizer):
  kinds = plan_gguf(config_of(row), tokenizer, 'Q8_0').kinds
  assert kinds[name] is gguf.GGMLQuantizationType.F32
  assert kinds['token_embd.weight'] is gguf.GGMLQuantizationType.Q8_0


def test_a_base_opens_with_its_tokenizer_and_its_ends(written, tokenizer):
  path, _ = written('llama')
  base = open_base(str(path))
  assert base.eos_token_ids == (1, 5)
  text = 'the then there'
  assert base.tokenizer.encode(text) == tokenizer.encode(text)
  assert base.model.file.metadata['general.file_type'] == 0


@pytest.mark.parametrize('damage', ['missing', 'nan', 'too large'])
def test_a_failed_save_keeps_what_was_there(damage, tokenizer, tmp_path):
  path = tmp_path / 'x.gguf'
  path.write_bytes(b'GGUF, an older one')
  plan = plan_gguf(config_of('llama'), tokenizer, 'F16')
  params = make_params(plan.config)
  if damage == 'missing':
    del params['layers']['mlp']['down_proj']
  else:
    kernel = params['layers']['mlp']['down_proj']['kernel']
    kernel[1, 2, 3] = np.nan if damage == 'nan' else 70000
  with pytest.raises((CheckpointError, ConfigError), match='down_proj'):
    save_gguf(path, plan, params)
  assert path.read_bytes() == b'GGUF, an older one'
  assert list(tmp_path.iterdir()) == [path]


def test_only_a_gguf_file_is_replaced(written, tokenizer, tmp_path):
  plan = plan_gguf(config_of('llama'), tokenizer)
  (tmp_path / 'x.gguf').write_bytes(b'a letter')
  (tmp_path / 'd.gguf').mkdir()
  for name in ('x.gguf', 'd.gguf', 'x.bin'):
    with pytest.raises(ConfigError, match=name):
      save_gguf(tmp_path / name, plan, make_params(plan.config))


def test_an_encoding_that_is_not_written_is_refused(tokenizer):
  with pytest.raises(ConfigError, match="'Q4_K'"):
    plan_gguf(config_of('llama'), tokenizer, 'Q4_K')
