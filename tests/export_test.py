import json

import jax.numpy as jnp
import numpy as np
import pytest

TOKENS = np.arange(5, 37).reshape(2, 16) * 7 % 300


@pytest.fixture(scope='session')
def tuned(finished):
  """The run, opened: 4-bit base with the adapter beside it."""
  from jlora import runs

  return runs.open_model(str(finished[0]), None, None)


@pytest.fixture(scope='session')
def logits(tuned):
  return np.asarray(tuned.apply({'params': tuned.params}, jnp.asarray(TOKENS)))


@pytest.fixture(scope='session')
def transformers():
  pytest.importorskip('torch')
  return pytest.importorskip('transformers')


def logits_of(model):
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def export(commands, run, *flags):
  ended = commands.run('export', f'--run={run}', *flags)
  assert (ended.rc, ended.stderr) == (0, '')


def test_transformers_computes_what_was_trained(
  commands, finished, logits, transformers, tmp_path
):
  flags = ('--to=merged', f'--out={tmp_path / "m"}', '--dtype=float32')
  export(commands, finished[0], *flags)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
  np.testing.assert_allclose(logits_of(model), logits, atol=1e-4)


def test_sixteen_bits_round_every_weight_once(
  commands, finished, tuned, tmp_path
):
  import ml_dtypes

  from jlora.checkpoints.bases import open_base
  from jlora.core.tree import leaves_by_path

  export(commands, finished[0], '--to=merged', f'--out={tmp_path / "m"}')
  assert json.loads((tmp_path / 'm/config.json').read_text())['dtype'] == (
    'bfloat16'
  )
  saved = leaves_by_path(open_base(str(tmp_path / 'm')).load_params())
  for path, leaf in leaves_by_path(tuned.dense('float32')).items():
    rounded = np.asarray(leaf).astype(ml_dtypes.bfloat16).astype('f4')
    np.testing.assert_array_equal(saved[path], rounded)


def test_a_gguf_file_computes_what_was_trained(
  commands, finished, tuned, logits, tmp_path
):
  from jlora.checkpoints.bases import open_base
  from jlora.models.decoder import Decoder

  path = tmp_path / 'm.gguf'
  flags = ('--to=gguf', f'--out={path}', '--dtype=float32')
  ended = commands.run('export', f'--run={finished[0]}', *flags)
  assert (ended.rc, ended.stderr) == (0, '')
  assert 'tensors in F32' in ended.stdout
  base = open_base(str(path))
  assert base.config == tuned.base.config
  assert base.eos_token_ids == tuned.base.eos_token_ids
  params = {'params': base.load_params()}
  found = Decoder(base.config).apply(params, jnp.asarray(TOKENS))
  np.testing.assert_allclose(found, logits, atol=1e-4)
  text = 'what is 3 + 4?<|im_end|>'
  expected = tuned.base.tokenizer.encode(text)
  assert base.tokenizer.encode(text) == expected


@pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`:FutureWarning')
def test_peft_opens_the_adapter_on_the_dequantized_base(
  commands, finished, tuned, logits, transformers, tmp_path
):
  peft = pytest.importorskip('peft')
  from jlora.checkpoints.hf import save_folder
  from jlora.core.quantized import dequantize

  export(commands, finished[0], '--to=peft', f'--out={tmp_path / "a"}')
  base = tuned.base
  frozen = dequantize(tuned.frozen)
  save_folder(tmp_path / 'b', base.config, frozen, base.tokenizer)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
  model = peft.PeftModel.from_pretrained(model, tmp_path / 'a')
  np.testing.assert_allclose(logits_of(model), logits, atol=1e-3)


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (('--to=onnx', '--out=x'), "'onnx'"),
    (('--to=gguf', '--out=x'), 'use NAME.gguf'),
    (('--to=gguf', '--out=x.gguf', '--dtype=Q4_K'), 'F16, BF16, F32, Q8_0'),
    (('--to=merged',), '--out is missing'),
    (('--to=merged', '--out=x', '--dtype=int8'), "'int8'"),
    (('--to=merged', '--out=x', '--run=nowhere'), "'nowhere'"),
  ],
)
def test_wrong_flags_are_refused_in_one_line(commands, flags, part):
  ended = commands.run('export', *flags)
  assert (ended.rc, ended.stdout) == (2, '')
  assert ended.stderr.count('\n') == 1
  assert part in ended.stderr
