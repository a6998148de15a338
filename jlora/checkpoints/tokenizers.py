"""Tokenizers of base models, from GGUF metadata or a Hugging Face folder."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jlora.errors import BaseModelError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

_KEY = 'tokenizer.ggml'
_CONTROL, _USER_DEFINED = 3, 4  # token types

# How text is cut before merges apply. llama.cpp names the ways in
# `tokenizer.ggml.pre`; each is that of the tokenizer.json it was made from.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_PRE_TYPES = {
  'gpt-2': 'gpt-2',
  'smollm': 'smollm',
  'llama-bpe': 'llama-bpe',
  'llama3': 'llama-bpe',
  'llama-v3': 'llama-bpe',
}


def from_gguf(metadata: Mapping[str, Any]) -> 'PreTrainedTokenizerFast':
  """Builds the tokenizer that a GGUF file describes.

  Args:
    metadata: Of the file; needs `tokenizer.ggml.*`.

  Returns:
    A tokenizer with special tokens and, where the file has one, the chat
    template.

  Raises:
    BaseModelError: The tokenizer is of a kind that is not rebuilt here, or is
      not whole.
  """
  from transformers import PreTrainedTokenizerFast

  pre = _pre_type(metadata)
  tokens = _tokens(metadata)
  special = _special_tokens(metadata, tokens)
  backend = _bpe(tokens, metadata.get(f'{_KEY}.merges', ()), pre)
  _add_tokens(backend, tokens, metadata.get(f'{_KEY}.token_type', ()))
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=metadata.get('tokenizer.chat_template'),
    add_bos_token=_adds_bos(metadata, pre) and 'bos_token' in special,
    add_eos_token=bool(metadata.get(f'{_KEY}.add_eos_token', False)),
    clean_up_tokenization_spaces=False,
    **special,
  )


def _pre_type(metadata: Mapping[str, Any]) -> str:
  model = metadata.get(f'{_KEY}.model')
  if model != 'gpt2':
    raise BaseModelError(
      f"the GGUF file's tokenizer is of the kind {model!r}; only byte-level BPE"
      " ('gpt2') is rebuilt from metadata. Load the model from its Hugging Face"
      ' folder instead'
    )
  pre = metadata.get(f'{_KEY}.pre', 'default')
  if pre not in _PRE_TYPES:
    raise BaseModelError(
      f"the GGUF file's tokenizer cuts text the way {pre!r}, which is not known"
      f' here ({", ".join(_PRE_TYPES)} are); load the model from its Hugging'
      ' Face folder instead'
    )
  return _PRE_TYPES[pre]


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
  tokens = metadata.get(f'{_KEY}.tokens')
  if not isinstance(tokens, list) or not tokens:
    raise BaseModelError(f'the GGUF file has no list {_KEY}.tokens')
  if len(set(tokens)) != len(tokens):
    raise BaseModelError(f'{_KEY}.tokens of the GGUF file repeats a token')
  return tokens


def _special_tokens(
  metadata: Mapping[str, Any], tokens: Sequence[str]
) -> dict[str, str]:
  names = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  special = {}
  for name, key in names.items():
    token_id = metadata.get(f'{_KEY}.{key}_token_id')
    if token_id is None:
      continue
    if not 0 <= token_id < len(tokens):
      raise BaseModelError(
        f'{_KEY}.{key}_token_id of the GGUF file is {token_id}, but it has'
        f' {len(tokens)} tokens'
      )
    special[f'{name}_token'] = tokens[token_id]
  return special


def _adds_bos(metadata: Mapping[str, Any], pre: str) -> bool:
  # llama.cpp's default where the file does not say.
  return bool(metadata.get(f'{_KEY}.add_bos_token', pre == 'llama-bpe'))


def _bpe(
  tokens: Sequence[str], merges: Sequence[str], pre: str
) -> tokenizers.Tokenizer:
  vocab = {token: i for i, token in enumerate(tokens)}
  pairs = [tuple(merge.split(' ')) for merge in merges]
  for pair in pairs:
    if len(pair) != 2 or not vocab.keys() >= {*pair, ''.join(pair)}:
      raise BaseModelError(
        f'{_KEY}.merges of the GGUF file has the entry {" ".join(pair)!r},'
        ' which does not join two of its tokens to a third'
      )
  backend = tokenizers.Tokenizer(
    models.BPE(vocab, pairs, ignore_merges=pre == 'llama-bpe')
  )
  backend.pre_tokenizer = _pre_tokenizer(pre)
  backend.decoder = decoders.ByteLevel()
  return backend


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
  if pre == 'gpt-2':
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if pre == 'smollm':
    # Digits first: a run of spaces before a number stays whole.
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), behavior='isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _add_tokens(
  backend: tokenizers.Tokenizer,
  tokens: Sequence[str],
  types: Sequence[int] | np.ndarray,
) -> None:
  """Adds the tokens that are found whole in a text before it is cut."""
  types = np.asarray(types)

  def of_type(number: int, special: bool) -> list[tokenizers.AddedToken]:
    ids = np.flatnonzero(types == number)
    return [
      tokenizers.AddedToken(tokens[i], normalized=False, special=special)
      for i in ids[ids < len(tokens)]
    ]

  backend.add_special_tokens(of_type(_CONTROL, True))
  backend.add_tokens(of_type(_USER_DEFINED, False))


def from_folder(
  folder: str | os.PathLike[str],
) -> 'PreTrainedTokenizerFast':
  """Loads the tokenizer of a Hugging Face folder; no code of it is run.

  Args:
    folder: Holds `tokenizer.json`.

  Raises:
    BaseModelError: The file is missing or unreadable.
  """
  from transformers import PreTrainedTokenizerFast

  folder = pathlib.Path(folder)
  if not (folder / 'tokenizer.json').is_file():
    raise BaseModelError(
      f'{folder} has no tokenizer.json; save the tokenizer there with'
      ' save_pretrained of a fast tokenizer in transformers'
    )
  try:
    return PreTrainedTokenizerFast.from_pretrained(
      folder, local_files_only=True
    )
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise BaseModelError(
      f'{folder} has an unreadable tokenizer: {error}'
    ) from error
