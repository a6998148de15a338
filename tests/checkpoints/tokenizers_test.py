import copy
import random

import pytest

from jlora.checkpoints import tokenizers
from jlora.checkpoints.gguf import GgufFile
from jlora.errors import BaseModelError

PARTS = (
  'hello', ' World', ' the', "don't", "I'LL", 'naïve', 'é', 'ß', 'İ', '𝔘',
  'a' * 30, '中文字', '日本語', '🙂', '👩‍👩‍👧', '\u200d', '\ufeff',
  '\u00a0', '\u3000', ' ', '  ', '    ', '\n', '\n\n', '\r\n', '\t', '\x00',
  '\x7f', '1', '42', '3.14', '１２', '½', '²', '०१', '{"a": [1, 2]}', '==',
  'def f(x):\n    return x ** 2',
  'http://x.y/z?q=1&r=2', '<|im_start|>', '<|im_end|>', '<|endoftext|>',
  '<|im_', 'user\n', '<repo_name>',
)  # fmt: skip


def strings(count):
  rng = random.Random(0)
  for i in range(count):
    if i % 4:
      yield ''.join(rng.choices(PARTS, k=rng.randint(1, 12)))
      continue
    ranges = [(32, 127), (160, 0x3000), (0x1F300, 0x1FAFF)]
    yield ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(30))


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


def test_spaces_before_a_number_stay_one_token():
  pre = tokenizers._pre_tokenizer('smollm')
  pieces = [piece for piece, _ in pre.pre_tokenize_str('a\n\n12')]
  assert pieces == ['a', 'ĊĊ', '1', '2']


def test_llama_3_cuts_numbers_into_threes():
  pre = tokenizers._pre_tokenizer('llama-bpe')
  pieces = [piece for piece, _ in pre.pre_tokenize_str("I'LL pay 12345\n\n")]
  assert pieces == ['I', "'LL", 'Ġpay', 'Ġ', '123', '45', 'ĊĊ']


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
    ({'model': 'llama'}, "kind 'llama'"),
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
