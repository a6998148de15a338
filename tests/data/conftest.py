"""A small byte-level tokenizer with the ChatML template, and tiny examples."""

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jlora.data.tokens import Example

CHATML = (
  '{% for message in messages %}'
  "{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}"
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
  " + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope='session')
def make_tokenizer():
  def make(template=CHATML, **special):
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<s>', '<|im_start|>', '<|im_end|>'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    text = ['user assistant system Be good\n\nthe answer is the answer']
    inner.train_from_iterator(text * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner,
      chat_template=template,
      **{'bos_token': '<s>', 'eos_token': '<|im_end|>', **special},
    )

  return make


@pytest.fixture(scope='session')
def tokenizer(make_tokenizer):
  return make_tokenizer()


@pytest.fixture(scope='session')
def make_examples():
  def make(lengths, seed=0):
    """Examples of distinct tokens whose second half is learned."""
    random = np.random.default_rng(seed)
    return [
      Example(
        random.integers(1, 1000, n).astype(np.int32), np.arange(n) >= n // 2
      )
      for n in lengths
    ]

  return make


@pytest.fixture
def write(tmp_path):
  def write_lines(*lines, name='data.jsonl'):
    path = tmp_path / name
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return str(path)

  return write_lines
