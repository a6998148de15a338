import copy

import gguf
import numpy as np
import pytest

from jlora.checkpoints import tokenizers
from jlora.checkpoints.cuts import CUTS
from jlora.checkpoints.gguf import GgufFile
from jlora.errors import BaseModelError
from tests.texts import spaced, strings


def transformers_tokenizer(path):
  """What transformers builds, cut as the original tokenizer.json cuts.

  transformers 5.23 knows no `smollm` way of cutting and falls back to GPT-2's,
  which takes a run of spaces before a number apart.
  """
  pytest.importorskip('torch')
  from tokenizers import pre_tokenizers
  from transformers import AutoTokenizer

  plain = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  digits = copy.deepcopy(plain)
  digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
  )
  return plain, digits


def test_tokens_equal_those_of_transformers(tiny_gguf):
  found = tokenizers.from_gguf(GgufFile(tiny_gguf).metadata)
  plain, oracle = transformers_tokenizer(tiny_gguf)
  for text in strings(200):
    assert found.encode(text) == oracle.encode(text)
  assert found.special_tokens_map == plain.special_tokens_map
  assert found.chat_template == plain.chat_template
  assert found.get_vocab() == plain.get_vocab()


@pytest.mark.slow
def test_2000_strings_have_the_tokens_of_transformers(real_gguf):
  found = tokenizers.from_gguf(GgufFile(real_gguf).metadata)
  plain, oracle = transformers_tokenizer(real_gguf)
  for text in strings(2000):
    ids = found.encode(text)
    assert ids == oracle.encode(text)
    assert found.decode(ids) == oracle.decode(ids)
  for text in filter(
    lambda t: not any(c.isnumeric() for c in t), strings(2000)
  ):
    assert found.encode(text) == plain.encode(text)
  chat = [{'role': 'user', 'content': 'hi'}]
  assert found.apply_chat_template(chat, tokenize=False) == (
    plain.apply_chat_template(chat, tokenize=False)
  )


def pieces(name, text):
  return [p for p, _ in CUTS[name].pre_tokenizer.pre_tokenize_str(text)]


def test_spaces_before_a_number_stay_one_token():
  assert pieces('smollm', 'a\n\n12') == ['a', 'ĊĊ', '1', '2']


@pytest.mark.parametrize(
  ('name', 'cut'),
  [
    ('gpt-2', ['I', "'", 'LL', 'Ġpay', 'Ġ12345', 'ĊĊ']),
    ('smollm', ['I', "'", 'LL', 'Ġpay', 'Ġ', *'12345', 'ĊĊ']),
    ('llama-bpe', ['I', "'LL", 'Ġpay', 'Ġ', '123', '45', 'ĊĊ']),
    ('dbrx', ['I', "'LL", 'Ġpay', 'Ġ', '123', '45', 'ĊĊ']),
    ('qwen2', ['I', "'LL", 'Ġpay', 'Ġ', *'12345', 'ĊĊ']),
    ('tekken', ['I', "'LL", 'Ġpay', 'Ġ', *'12345', 'ĊĊ']),
    ('gpt-4o', ["I'LL", 'Ġpay', 'Ġ', '123', '45', 'ĊĊ']),
  ],
)
def test_numbers_and_endings_are_cut_as_the_name_says(name, cut):
  assert pieces(name, "I'LL pay 12345\n\n") == cut


@pytest.mark.parametrize('name', ['tekken', 'gpt-4o'])
def test_words_start_anew_at_a_capital(name):
  assert pieces(name, 'aB camelCase a/\n') == [
    'a', 'B', 'Ġcamel', 'Case', 'Ġa', '/Ċ'
  ]  # fmt: skip


@pytest.mark.parametrize('name', ['llama-bpe', 'dbrx', 'qwen2', 'tekken'])
def test_every_cut_is_that_of_transformers(name, write_gguf, tmp_path):
  pytest.importorskip('torch')
  from transformers import AutoTokenizer

  write_gguf(tmp_path / 'x.gguf', kv={'pre': name})
  oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file='x.gguf')
  found = CUTS[name].pre_tokenizer
  expected = oracle.backend_tokenizer.pre_tokenizer
  for text in strings(200):
    assert found.pre_tokenize_str(text) == expected.pre_tokenize_str(text)


def oracle_of(metadata, architecture, folder):
  """What transformers builds from the same metadata."""
  pytest.importorskip('torch')
  from transformers import AutoTokenizer

  writer = gguf.GGUFWriter(folder / 'x.gguf', architecture)
  for key, value in metadata.items():
    if isinstance(value, list | np.ndarray):
      writer.add_array(key, np.asarray(value).tolist())
      continue
    kinds = {str: 'string', bool: 'bool', int: 'uint32'}
    getattr(writer, f'add_{kinds[type(value)]}')(key, value)
  for step in ('header', 'kv_data', 'tensors'):
    getattr(writer, f'write_{step}_to_file')()
  writer.close()
  return AutoTokenizer.from_pretrained(folder, gguf_file='x.gguf')


# The class that transformers takes for Llama adds no space to a text that
# begins with one, nor behind special tokens; that for Phi-3 does, as llama.cpp.
@pytest.mark.parametrize(
  ('architecture', 'prefix'), [('phi3', True), ('gemma3', False)]
)
def test_pieces_equal_those_of_transformers(
  architecture, prefix, pieces_of_text, tmp_path
):
  metadata = {
    **pieces_of_text,
    'tokenizer.ggml.add_space_prefix': prefix,
    'tokenizer.ggml.add_bos_token': True,
  }
  found = tokenizers.from_gguf(metadata)
  oracle = oracle_of(metadata, architecture, tmp_path)
  for text in spaced(300):
    assert found.encode(text) == oracle.encode(text)
    if prefix:
      ids = found.encode(text, add_special_tokens=False)
      assert found.decode(ids) == text or '<s>' in text or '<|user|>' in text


def test_the_best_score_is_merged_first(pieces_of_text):
  found = tokenizers.from_gguf(pieces_of_text)
  assert found.tokenize('there') == ['▁the', 'r', 'e']  # not ▁t he re


def test_characters_that_are_no_tokens_become_bytes(pieces_of_text):
  found = tokenizers.from_gguf(pieces_of_text)
  ids = found.encode('🙂', add_special_tokens=False)
  assert found.convert_ids_to_tokens(ids) == [
    '▁', '<0xF0>', '<0x9F>', '<0x99>', '<0x82>'
  ]  # fmt: skip
  assert found.decode(ids) == '🙂'


def test_a_start_token_is_the_habit_of_sentence_piece(pieces_of_text):
  assert tokenizers.from_gguf(pieces_of_text).encode('the')[0] == 1
  metadata = {**pieces_of_text, 'tokenizer.ggml.add_bos_token': False}
  assert tokenizers.from_gguf(metadata).encode('the')[0] != 1


def test_pieces_without_a_score_each_are_refused(pieces_of_text):
  metadata = {**pieces_of_text, 'tokenizer.ggml.scores': np.zeros(7)}
  with pytest.raises(BaseModelError, match=r'7 tokenizer.ggml.scores'):
    tokenizers.from_gguf(metadata)


@pytest.mark.parametrize('value', ['x', 3, 10**9, -1, True, ['a'], [1.5]])
def test_a_value_of_another_type_never_crashes(
  value, pieces_of_text, write_gguf, tmp_path
):
  byte_level = GgufFile(write_gguf(tmp_path / 'x.gguf')).metadata
  value = np.array(value) if value == [1.5] else value
  for metadata in (pieces_of_text, byte_level):
    for key in [k for k in metadata if k.startswith('tokenizer')]:
      try:
        tokenizers.from_gguf({**metadata, key: value})
      except BaseModelError as error:
        assert 'GGUF file' in str(error)  # noqa: PT017


def test_text_is_composed_before_qwen_cuts_it(write_gguf, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', kv={'pre': 'qwen2'})
  found = tokenizers.from_gguf(GgufFile(path).metadata)
  assert found.encode('e\u0301') == found.encode('é')


def test_text_survives_encoding_and_decoding(tiny_gguf):
  tokenizer = tokenizers.from_gguf(GgufFile(tiny_gguf).metadata)
  for text in strings(50):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_renders(tiny_gguf):
  tokenizer = tokenizers.from_gguf(GgufFile(tiny_gguf).metadata)
  ids = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'hi'}], return_dict=False
  )
  assert (ids[0], ids[-2]) == (1, 2)


@pytest.mark.parametrize('adds', [False, True])
def test_a_start_token_is_added_where_the_file_says(adds, write_gguf, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', kv={'add_bos': adds})
  tokenizer = tokenizers.from_gguf(GgufFile(path).metadata)
  assert (tokenizer.encode('the')[0] == 1) == adds


@pytest.mark.parametrize(
  ('kv', 'message'),
  [
    ({'model': 'bert'}, "kind 'bert'"),
    ({'model': 'llama'}, '300 tokens, but 0'),
    ({'pre': 'dolphin'}, "'dolphin'"),
    ({'merges': ['a b c']}, "'a b c'"),
    ({'merges': ['x nowhere']}, "'x nowhere'"),
    ({'eos': 300}, 'eos_token_id of the GGUF file is 300'),
    ({'tokens': ['a'] * 300}, 'repeats a token'),
  ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(
  kv, message, write_gguf, tmp_path
):
  path = write_gguf(tmp_path / 'x.gguf', kv=kv)
  with pytest.raises(BaseModelError, match=message):
    tokenizers.from_gguf(GgufFile(path).metadata)


def test_a_saved_tokenizer_is_loaded_as_it_was(tiny_gguf, tmp_path):
  original = tokenizers.from_gguf(GgufFile(tiny_gguf).metadata)
  original.save_pretrained(tmp_path)
  loaded = tokenizers.from_folder(tmp_path)
  for text in strings(50):
    assert loaded.encode(text) == original.encode(text)
  assert loaded.chat_template == original.chat_template
  assert loaded.special_tokens_map == original.special_tokens_map


def test_a_folder_without_or_with_a_broken_tokenizer_is_refused(tmp_path):
  with pytest.raises(BaseModelError, match=r'no tokenizer\.json'):
    tokenizers.from_folder(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"version": "1.0"}')
  with pytest.raises(BaseModelError, match='unreadable tokenizer'):
    tokenizers.from_folder(tmp_path)
