"""A tokenizer in the metadata of a GGUF file, as llama.cpp reads it.

A file holds tokens, their types, and merges or scores; how text is cut is one
of a list of names. A tokenizer that does anything else is refused: what is
written is read again, and both must make the same tokens of a sample.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.checkpoints.cuts import CUTS
from jlora.checkpoints.tokenizers import (
  BYTE,
  CONTROL,
  KEY,
  NORMAL,
  SPECIAL,
  SPELLED_SPACE,
  UNKNOWN,
  UNUSED,
  USER_DEFINED,
  from_gguf,
)
from jlora.errors import ConfigError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Endings, numbers, cases, scripts, spaces and combined characters, in which no
# two ways to cut agree.
SAMPLE = (
  "It's 3 o'clock, I'LL pay $1234.50 (or 12 345)!\n\n  def f(x):\n\t return"
  ' x**2  # camelCase HTTPServer a/b//c\r\n\r\n   naïve e\u0301 Ω ﬁ Straße'
  ' Привет, мир 中文字 123４ 日本語 한국어 ०१ 🙂👩\u200d👧 ... !!??'
  ' \u00a0\u3000 end  '
)
_MORE_ENDS = ('eot', 'eom')  # beside eos


def write_tokenizer(
  tokenizer: 'PreTrainedTokenizerBase',
  rows: int,
  eos_token_ids: Sequence[int] = (),
) -> dict[str, Any]:
  """Returns the metadata from which the same tokenizer is built.

  Args:
    tokenizer: A fast tokenizer.
    rows: Of the embedding; ids that are no tokens get names that no text has.
    eos_token_ids: Ids that end a generation.

  Raises:
    ConfigError: The tokenizer does something that GGUF cannot express.
  """
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  model = backend['model']
  if model['type'] != 'BPE':
    raise ConfigError(
      f"the tokenizer's model is {model['type']}, which cannot be written as"
      ' GGUF; known is BPE, over bytes or with bytes for unknown characters'
    )
  tokens, types = _tokens(tokenizer, rows)
  metadata = {f'{KEY}.tokens': tokens, f'{KEY}.token_type': types}
  pairs = [_pair(merge) for merge in model['merges']]
  if model.get('byte_fallback'):
    metadata |= _sentence_piece(tokens, pairs, types, backend)
  else:
    merges = [' '.join(pair) for pair in pairs]
    metadata[f'{KEY}.model'] = 'gpt2'
    metadata[f'{KEY}.pre'] = _cut_of(tokenizer, model)
    metadata[f'{KEY}.merges'] = merges
  metadata |= _special(tokenizer, eos_token_ids)
  _check(tokenizer, metadata)
  return metadata


def _tokens(
  tokenizer: 'PreTrainedTokenizerBase', rows: int
) -> tuple[list[str], list[int]]:
  """Returns a token and its type for each row of the embedding."""
  tokens = [f'[PAD{i}]' for i in range(rows)]
  types = [UNUSED] * rows
  for token, i in tokenizer.get_vocab().items():
    if i >= rows:
      raise ConfigError(
        f'the token {token!r} has the id {i}, but the embedding has {rows} rows'
      )
    tokens[i], types[i] = token, NORMAL
  for i, added in tokenizer.added_tokens_decoder.items():
    types[i] = CONTROL if added.special else USER_DEFINED
  return tokens, types


def _pair(merge: str | list[str]) -> tuple[str, str]:
  left, right = merge.split(' ') if isinstance(merge, str) else merge
  return left, right


def _sentence_piece(
  tokens: Sequence[str],
  pairs: Sequence[tuple[str, str]],
  types: list[int],
  backend: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns what is particular to this kind; marks bytes in `types`."""
  best: dict[str, float] = {}
  for rank, pair in enumerate(pairs):
    best.setdefault(''.join(pair), -float(rank))
  scores = [best.get(token, -float(len(pairs))) for token in tokens]
  for i, token in enumerate(tokens):
    if len(token) == 6 and token.startswith('<0x') and types[i] == NORMAL:
      types[i] = BYTE
  unknown = backend['model'].get('unk_token')
  if unknown in tokens and types[tokens.index(unknown)] == NORMAL:
    types[tokens.index(unknown)] = UNKNOWN
  steps = json.dumps(
    [backend['normalizer'], backend['pre_tokenizer']], ensure_ascii=False
  )
  prefixed = f'"prepend": "{SPELLED_SPACE}"' in steps or (
    '"Metaspace"' in steps and '"prepend_scheme": "never"' not in steps
  )
  return {
    f'{KEY}.model': 'llama',
    f'{KEY}.pre': 'default',
    f'{KEY}.scores': scores,
    f'{KEY}.add_space_prefix': prefixed,
  }


def _cut_of(
  tokenizer: 'PreTrainedTokenizerBase', model: Mapping[str, Any]
) -> str:
  """Returns the name of the way in which a tokenizer cuts the sample."""
  backend = tokenizer.backend_tokenizer

  def words(normalizer: Any, pre_tokenizer: Any) -> Any:
    text = normalizer.normalize_str(SAMPLE) if normalizer else SAMPLE
    return pre_tokenizer and pre_tokenizer.pre_tokenize_str(text)

  found = words(backend.normalizer, backend.pre_tokenizer)
  for name, cut in CUTS.items():
    same = cut.ignore_merges == bool(model.get('ignore_merges'))
    if same and words(cut.normalizer, cut.pre_tokenizer) == found:
      return name
  raise ConfigError(
    'the tokenizer cuts text in a way for which GGUF has no name; known are'
    f' {", ".join(CUTS)}'
  )


def _special(
  tokenizer: 'PreTrainedTokenizerBase', eos_token_ids: Sequence[int]
) -> dict[str, Any]:
  found = {}
  for name, key in SPECIAL.items():
    if (token_id := getattr(tokenizer, f'{name}_token_id')) is not None:
      found[f'{KEY}.{key}_token_id'] = token_id
  ends = [i for i in eos_token_ids if i != tokenizer.eos_token_id]
  if f'{KEY}.eos_token_id' not in found and ends:
    found[f'{KEY}.eos_token_id'] = ends.pop(0)
  if dropped := ends[len(_MORE_ENDS) :]:
    warnings.warn(
      f'GGUF names three ids that end a text; {dropped} are left out',
      stacklevel=4,
    )
  for name, token_id in zip(_MORE_ENDS, ends, strict=False):
    found[f'{KEY}.{name}_token_id'] = token_id
  ids = tokenizer.encode('')
  for name in ('bos', 'eos'):
    token_id = getattr(tokenizer, f'{name}_token_id')
    found[f'{KEY}.add_{name}_token'] = token_id in ids
  if isinstance(tokenizer.chat_template, str):
    found['tokenizer.chat_template'] = tokenizer.chat_template
  return found


def _check(
  tokenizer: 'PreTrainedTokenizerBase', metadata: Mapping[str, Any]
) -> None:
  """Compares the tokenizer with what is read again."""
  arrays = (f'{KEY}.scores', f'{KEY}.token_type')
  as_read = {k: np.asarray(metadata[k]) for k in arrays if k in metadata}
  again = from_gguf({**metadata, **as_read})
  if (found := again.encode(SAMPLE)) != (ids := tokenizer.encode(SAMPLE)):
    at = next(
      (i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b),
      min(len(found), len(ids)),
    )
    raise ConfigError(
      'the tokenizer does something that GGUF cannot express: of a sample it'
      f' makes {tokenizer.convert_ids_to_tokens(ids[at : at + 3])}, and what is'
      f' read from GGUF {again.convert_ids_to_tokens(found[at : at + 3])}'
    )
  added = list(tokenizer.added_tokens_decoder.values())
  spaced = sum(token.lstrip or token.rstrip for token in added)
  beside = f' {added[0].content} x' if added else ' x'
  if spaced or again.encode(beside) != tokenizer.encode(beside):
    warnings.warn(
      'spaces at the start of a text and beside special tokens are read in'
      f' another way from GGUF than by the tokenizer ({spaced} tokens take them'
      ' in)',
      stacklevel=4,
    )
