import numpy as np
import pytest
import tokenizers as backends
from tokenizers import models, normalizers, pre_tokenizers

from jlora.checkpoints import tokenizers
from jlora.checkpoints.cuts import CUTS
from jlora.checkpoints.gguf_vocabulary import SAMPLE, write_tokenizer
from jlora.errors import ConfigError
from tests.texts import spaced

KEY = 'tokenizer.ggml'


def read(metadata):
  """Reads metadata as it comes out of a file."""
  arrays = {
    k: np.asarray(v)
    for k, v in metadata.items()
    if k in (f'{KEY}.scores', f'{KEY}.token_type')
  }
  return tokenizers.from_gguf({**metadata, **arrays})


@pytest.fixture
def byte_level(vocabulary):
  """Returns a function of a cut's name: a tokenizer that cuts so."""
  tokens, merges = vocabulary

  def make(name):
    metadata = {
      f'{KEY}.model': 'gpt2',
      f'{KEY}.pre': name,
      f'{KEY}.tokens': tokens,
      f'{KEY}.merges': merges,
      f'{KEY}.token_type': [3, 3, 3, 4, *[1] * (len(tokens) - 4)],
      f'{KEY}.bos_token_id': 1,
      f'{KEY}.eos_token_id': 2,
      'tokenizer.chat_template': '{{ messages }}',
    }
    return metadata, read(metadata)

  return make


@pytest.mark.parametrize('name', CUTS)
def test_a_byte_level_tokenizer_is_written_as_it_was_read(name, byte_level):
  metadata, tokenizer = byte_level(name)
  found = write_tokenizer(tokenizer, len(tokenizer))
  assert CUTS[name] == CUTS[found[f'{KEY}.pre']]
  metadata.pop(f'{KEY}.pre')
  assert metadata.items() <= found.items()
  assert found[f'{KEY}.add_bos_token'] == CUTS[name].adds_bos


def test_no_two_names_cut_the_sample_alike(byte_level):
  cuts = {CUTS[name]: byte_level(name)[1] for name in CUTS}
  found = set()
  for cut, tokenizer in cuts.items():
    backend = tokenizer.backend_tokenizer
    text = SAMPLE
    if backend.normalizer:
      text = backend.normalizer.normalize_str(text)
    words = backend.pre_tokenizer.pre_tokenize_str(text)
    found.add((tuple(words), cut.ignore_merges))
  assert len(found) == len(cuts)


def test_rows_without_a_token_get_names_that_no_text_has(byte_level):
  _, tokenizer = byte_level('qwen2')
  found = write_tokenizer(tokenizer, len(tokenizer) + 2)
  assert found[f'{KEY}.tokens'][-2:] == ['[PAD300]', '[PAD301]']
  assert found[f'{KEY}.token_type'][-2:] == [5, 5]
  assert 301 not in read(found).encode('[PAD301]')


def test_a_token_without_a_row_is_refused(byte_level):
  _, tokenizer = byte_level('qwen2')
  with pytest.raises(ConfigError, match=r'has the id 299, but .* 299 rows'):
    write_tokenizer(tokenizer, len(tokenizer) - 1)


def test_three_ends_are_written_and_more_are_said(byte_level):
  _, tokenizer = byte_level('gpt-2')
  found = write_tokenizer(tokenizer, 300, (2, 7, 8))
  ends = [found[f'{KEY}.{name}_token_id'] for name in ('eos', 'eot', 'eom')]
  assert ends == [2, 7, 8]
  with pytest.warns(UserWarning, match=r'\[9\] are left out'):
    write_tokenizer(tokenizer, 300, (2, 7, 8, 9))


@pytest.mark.parametrize('prefix', [True, False])
def test_pieces_are_merged_again_in_the_same_order(prefix, pieces_of_text):
  metadata = {**pieces_of_text, f'{KEY}.add_space_prefix': prefix}
  tokenizer = read(metadata)
  found = write_tokenizer(tokenizer, len(tokenizer))
  assert found[f'{KEY}.add_space_prefix'] == prefix
  assert found[f'{KEY}.tokens'] == metadata[f'{KEY}.tokens']
  # The unknown token became a special one.
  types = metadata[f'{KEY}.token_type'].tolist()
  assert found[f'{KEY}.token_type'][1:] == types[1:]
  again = read(found)
  for text in spaced(100):
    assert again.encode(text) == tokenizer.encode(text)


def test_the_metaspace_of_newer_tokenizers_is_a_prefix(pieces_of_text):
  tokenizer = read(pieces_of_text)
  backend = tokenizer.backend_tokenizer
  backend.normalizer = normalizers.Sequence([])
  backend.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme='first', split=False
  )
  with pytest.warns(UserWarning, match='beside special tokens'):
    found = write_tokenizer(tokenizer, len(tokenizer))
  assert found[f'{KEY}.add_space_prefix']


def test_tokens_that_take_spaces_in_are_said(byte_level):
  _, tokenizer = byte_level('gpt-2')
  token = backends.AddedToken('<|x|>', rstrip=True, special=True)
  tokenizer.add_special_tokens({'additional_special_tokens': [token]})
  with pytest.warns(UserWarning, match='1 tokens take them in'):
    write_tokenizer(tokenizer, len(tokenizer))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pre_tokenizer': pre_tokenizers.Whitespace()}, 'has no name'),
    ({'pre_tokenizer': pre_tokenizers.ByteLevel()}, 'has no name'),
    ({'normalizer': normalizers.NFKC()}, 'has no name'),
    ({'model': models.WordLevel({'a': 0}, 'a')}, 'WordLevel'),
    ({'model': models.Unigram([('a', 0.0)], 0)}, 'Unigram'),
  ],
)
def test_what_gguf_cannot_express_is_refused(change, message, byte_level):
  _, tokenizer = byte_level('gpt-2')
  for name, value in change.items():
    setattr(tokenizer.backend_tokenizer, name, value)
  with pytest.raises(ConfigError, match=message):
    write_tokenizer(tokenizer, 300)


def test_pieces_with_a_normalizer_of_their_own_are_refused(pieces_of_text):
  tokenizer = read(pieces_of_text)
  steps = [normalizers.Lowercase(), tokenizer.backend_tokenizer.normalizer]
  tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
  with pytest.raises(ConfigError, match='of a sample it makes'):
    write_tokenizer(tokenizer, len(tokenizer))
