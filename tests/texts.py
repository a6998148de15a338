"""Texts that tokenizers are compared on."""

import random

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


def spaced(count):
  """Strings around words that the small model has."""
  rng = random.Random(1)
  parts = ('the', ' the', ' you', 'hello', '  ', ' ', '12', '中文', 'é', '🙂',
           '\n\n', ' world', 'zq', '<|user|>', '<s>', '.', 'ther')  # fmt: skip
  for _ in range(count):
    yield ''.join(rng.choices(parts, k=rng.randint(1, 9)))
