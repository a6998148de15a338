import json

import jax
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
  return ended.stdout


def test_transformers_computes_what_was_trained(
  commands, finished, logits, transformers, tmp_path
):
  flags = ('--to=merged', f'--out={tmp_path / "m"}', '--dtype=float32')
  text = export(commands, finished[0], *flags)
  assert 'differ from the trained ones by 0.0% of the adapter' in text
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
  assert 'differ from the trained ones by 0.0% of the adapter' in ended.stdout
  base = open_base(str(path))
  assert base.config == tuned.base.config
  assert base.eos_token_ids == tuned.base.eos_token_ids
  params = {'params': base.load_params()}
  found = Decoder(base.config).apply(params, jnp.asarray(TOKENS))
  np.testing.assert_allclose(found, logits, atol=1e-4)
  text = 'what is 3 + 4?<|im_end|>'
  expected = tuned.base.tokenizer.encode(text)
  assert base.tokenizer.encode(text) == expected


def test_a_merged_folder_gives_the_adapted_models_text(
  finished, tuned, transformers, tmp_path
):
  import torch

  from jlora.data.conversations import Conversation, Message
  from jlora.data.tokens import prompt_tokens
  from jlora.inference import exports
  from jlora.inference.sampler import generate
  from jlora.inference.sampling import Sampling

  distance = exports.write_merged(tuned, tmp_path / 'm', exports.Files())
  assert 0 < distance.share < 0.01  # bfloat16 has 8 bits
  assert (distance.tensors, distance.adapted) == (20, 14)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'm', dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')
  asked = [f'what is {i} + {j}?' for i in range(5) for j in (1, 3)]
  prompts = [
    prompt_tokens(
      Conversation((Message('user', text), Message('assistant', ''))),
      tuned.base.tokenizer,
    )
    for text in asked
  ]
  found = generate(
    tuned.apply,
    tuned.params,
    tuned.base.config,
    prompts,
    Sampling(max_new_tokens=6),
    eos_token_ids=tuned.base.eos_token_ids,
    batch_size=10,
    dtype=tuned.dtype,
  )
  answers = set()
  for text, mine in zip(asked, found, strict=True):
    ids = tokenizer.apply_chat_template(
      [{'role': 'user', 'content': text}],
      add_generation_prompt=True,
      return_tensors='pt',
    )['input_ids']
    theirs = model.generate(ids, max_new_tokens=6, do_sample=False)
    theirs = tokenizer.decode(theirs[0, ids.shape[1] :], True)
    assert tuned.base.tokenizer.decode(mine, skip_special_tokens=True) == theirs
    answers.add(theirs)
  assert len(answers) > 2


@pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`:FutureWarning')
def test_bitsandbytes_opens_the_codes_and_peft_the_adapter_beside(
  commands, finished, logits, transformers, tmp_path
):
  peft, bnb = map(pytest.importorskip, ('peft', 'bitsandbytes'))
  flags = ('--to=bnb4', f'--out={tmp_path / "q"}', '--dtype=float32')
  text = export(commands, finished[0], *flags, '--max_shard_size=60KB')
  assert '7 leaves are written in the codes they are in' in text
  assert len(list((tmp_path / 'q').glob('*.safetensors'))) > 1
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'q')
  linear = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
  assert len(linear) == 14
  assert all(m.weight.quant_state.nested for m in linear)
  model = peft.PeftModel.from_pretrained(model, tmp_path / 'q-adapter')
  model.train()  # in eval mode, its CPU kernel computes in bfloat16
  np.testing.assert_allclose(logits_of(model), logits, atol=1e-3)


def test_the_codes_are_those_that_bitsandbytes_would_store(
  tuned, tiny_base, tmp_path
):
  from safetensors.torch import load_file

  from jlora.inference import exports, packing
  from tests.checkpoints.packing_4bit import is_linear, pack

  packing.write_packed(tuned, tmp_path / 'q', exports.Files(dtype='float32'))
  found = load_file(tmp_path / 'q' / 'model.safetensors')
  dense = load_file(tiny_base / 'model.safetensors')
  off = total = 0
  for name in filter(is_linear, dense):
    for key, expected in pack(name, dense[name]).items():
      if key.endswith('.absmax'):  # its CPU library rounds by another table
        off += (found[key] != expected).sum().item()
        total += expected.numel()
        assert (found[key].int() - expected.int()).abs().max() <= 1
      elif 'quant_state' in key:
        mine, theirs = (
          json.loads(x.numpy().tobytes()) for x in (found[key], expected)
        )
        offset = theirs.pop('nested_offset')
        assert mine.pop('nested_offset') == pytest.approx(offset, rel=4e-7)
        assert list(mine.items()) == list(theirs.items())
      elif 'nested_absmax' in key:  # of absmax less the offset
        np.testing.assert_allclose(found[key], expected, rtol=1e-5)
      else:
        assert found[key].numpy().tobytes() == expected.numpy().tobytes()
  assert off <= 0.01 * total


def test_a_base_in_codes_is_trained_on_and_exported_as_it_is(
  commands, tuned, tmp_path
):
  from jlora import runs
  from jlora.core.quantized import is_quantized
  from jlora.core.tree import leaves_by_path
  from jlora.inference import exports, packing
  from jlora.inference.tuned import load_tuned

  files = exports.Files(dtype='float32')
  packing.write_packed(tuned, tmp_path / 'q', files)
  flags = (f'--config.base={tmp_path / "q"}', '--config.train.steps=2')
  ended = commands.train(tmp_path / 'run', *flags)
  assert ended.rc == 0, ended.stderr
  assert 'in 4 bits: 7 leaves, 7 of them used as they are\n' in ended.stdout
  again = runs.open_model(str(tmp_path / 'run'), None, None)
  leaves = leaves_by_path(tuned.frozen, is_quantized)
  assert again.metadata['quantization']['targets'] == sorted(
    path for path, leaf in leaves.items() if is_quantized(leaf)
  )
  for name in ('codes', 'scales', 'scales2', 'offset'):
    np.testing.assert_array_equal(
      *(
        getattr(x.frozen['layers']['mlp']['up_proj']['kernel'], name)
        for x in (tuned, again)
      )
    )
  packing.write_packed(again, tmp_path / 'copy', files)
  opened = load_tuned(str(tmp_path / 'copy'), tmp_path / 'copy-adapter')
  jax.tree.map(
    np.testing.assert_array_equal,
    (opened.frozen, opened.trainable),
    (again.frozen, again.trainable),
  )
  for path in (tmp_path / 'q').iterdir():
    assert (tmp_path / 'copy' / path.name).read_bytes() == path.read_bytes()


def test_quantizing_again_must_be_asked_for_twice(commands, finished, tmp_path):
  flags = ('--to=bnb4', f'--out={tmp_path / "q"}', '--requantize')
  ended = commands.run('export', f'--run={finished[0]}', *flags)
  assert ended.rc == 2
  assert "of the adapted kernels' codes change" in ended.stderr
  assert 'or write this with --anyway' in ended.stderr
  assert not (tmp_path / 'q').exists()
  text = export(commands, finished[0], *flags, '--anyway')
  assert 'weights are written in bfloat16, the default' in text
  assert '7 leaves are written in the codes they are in' in text
  assert not (tmp_path / 'q-adapter').exists()


@pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`:FutureWarning')
def test_peft_opens_the_adapter_on_the_dequantized_base(
  commands, finished, tuned, logits, transformers, tmp_path
):
  peft = pytest.importorskip('peft')
  from jlora.checkpoints.model_folders import save_folder
  from jlora.core.quantized import dequantize

  export(commands, finished[0], '--to=peft', f'--out={tmp_path / "a"}')
  base = tuned.base
  frozen = dequantize(tuned.frozen)
  save_folder(tmp_path / 'b', base.config, frozen, base.tokenizer)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
  model = peft.PeftModel.from_pretrained(model, tmp_path / 'a')
  np.testing.assert_allclose(logits_of(model), logits, atol=1e-3)


def test_a_run_is_not_replaced_by_its_own_export(commands, finished):
  run = finished[0]
  for to, out in (('peft', run / 'adapter'), ('merged', run)):
    ended = commands.run('export', f'--run={run}', f'--to={to}', f'--out={out}')
    assert ended.rc == 2
    assert f'{run / "adapter"}, which it is made from' in ended.stderr


def test_what_was_trained_whole_is_exported_in_float32(commands, tmp_path):
  from jlora.checkpoints.bases import open_base

  flags = ('--config.train.steps=2', '--config.train.dtype=bfloat16')
  ended = commands.train(tmp_path / 'run', *flags, experiment='full')
  assert ended.rc == 0, ended.stderr
  out = (f'--out={tmp_path / "m"}', '--dtype=float32')
  text = export(commands, tmp_path / 'run', '--to=merged', *out)
  assert (
    "no adapter, and the written weights differ from the model's by 0.00%"
    in text
  )
  trained, found = (
    open_base(str(tmp_path / name)).load_params() for name in ('run/model', 'm')
  )
  jax.tree.map(np.testing.assert_array_equal, found, trained)
  ended = commands.run(
    'export', f'--run={tmp_path / "run"}', '--to=peft', '--out=x'
  )
  assert 'there is no adapter to write; use --to=merged' in ended.stderr


def test_a_base_in_float16_is_written_in_float16(commands, tiny_base, tmp_path):
  from jlora.checkpoints.bases import open_base
  from jlora.checkpoints.model_folders import save_folder

  base = open_base(str(tiny_base))
  params = base.load_params()
  save_folder(tmp_path / 'h', base.config, params, base.tokenizer, 'float16')
  flags = (f'--base={tmp_path / "h"}', f'--out={tmp_path / "g"}')
  ended = commands.run('export', *flags, '--to=merged')
  assert 'weights are written in float16, of the base' in ended.stdout
  half = json.loads((tmp_path / 'g/config.json').read_text())
  assert half['dtype'] == 'float16'


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (('--to=onnx', '--out=x'), "'onnx'"),
    (('--to=gguf', '--out=x'), 'use NAME.gguf'),
    (('--to=gguf', '--out=x.gguf', '--dtype=Q4_K'), 'F16, BF16, F32, Q8_0'),
    (('--to=merged',), '--out is missing'),
    (('--to=merged', '--out=x', '--dtype=int8'), "'int8'"),
    (('--to=merged', '--out=x', '--into=base'), "'base'"),
    (('--to=peft', '--out=x', '--into=original'), 'with --to=merged'),
    (('--to=merged', '--out=x', '--requantize'), 'with --to=bnb4'),
    (('--to=peft', '--out=x', '--dtype=float32'), 'merged, gguf or bnb4'),
    (('--to=gguf', '--out=x.gguf', '--max_shard_size=5GB'), 'merged or bnb4'),
    (('--to=merged', '--out=x', '--max_shard_size=big'), "'big'"),
    (('--to=merged', '--out=x', '--run=nowhere'), "'nowhere'"),
  ],
)
def test_wrong_flags_are_refused_in_one_line(commands, flags, part):
  ended = commands.run('export', *flags)
  assert (ended.rc, ended.stdout) == (2, '')
  assert ended.stderr.count('\n') == 1
  assert part in ended.stderr
