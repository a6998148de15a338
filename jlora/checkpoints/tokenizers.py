"""Tokenizers of base models, from GGUF metadata or a Hugging Face folder."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers

from jlora.checkpoints.cuts import CUTS
from jlora.errors import BaseModelError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

KEY = 'tokenizer.ggml'
# Token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Of a special token in transformers, its name in GGUF.
SPECIAL = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}

SPELLED_SPACE = '▁'  # how SentencePiece spells a space


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

  _check_types(metadata)
  tokens = _tokens(metadata)
  special = _special_tokens(metadata, tokens)
  kind = metadata.get(f'{KEY}.model')
  if kind == 'gpt2':
    backend, adds_bos = _byte_level(metadata, tokens)
  elif kind == 'llama':
    backend, adds_bos = _sentence_piece(metadata, tokens), True
  else:
    raise BaseModelError(
      f"the GGUF file's tokenizer is of the kind {kind!r}; only byte-level BPE"
      " ('gpt2') and SentencePiece's ('llama') are rebuilt from metadata. Load"
      ' the model from its Hugging Face folder instead'
    )
  _add_tokens(backend, tokens, metadata.get(f'{KEY}.token_type', ()))
  adds_bos = bool(metadata.get(f'{KEY}.add_bos_token', adds_bos))
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=metadata.get('tokenizer.chat_template'),
    add_bos_token=adds_bos and 'bos_token' in special,
    add_eos_token=bool(metadata.get(f'{KEY}.add_eos_token', False)),
    clean_up_tokenization_spaces=False,
    **special,
  )


def _check_types(metadata: Mapping[str, Any]) -> None:
  wanted = {
    'tokenizer.chat_template': str,
    f'{KEY}.add_bos_token': bool,
    f'{KEY}.add_eos_token': bool,
    f'{KEY}.add_space_prefix': bool,
    f'{KEY}.merges': list,
    f'{KEY}.model': str,
    f'{KEY}.pre': str,
    f'{KEY}.scores': np.ndarray,
    f'{KEY}.token_type': np.ndarray,
    f'{KEY}.tokens': list,
    **{f'{KEY}.{key}_token_id': int for key in SPECIAL.values()},
  }
  for key, kind in wanted.items():
    if key in metadata and type(metadata[key]) is not kind:
      raise BaseModelError(
        f'the GGUF file has {key}={metadata[key]!r:.80}, which must be of the'
        f' type {kind.__name__}'
      )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
  tokens = metadata.get(f'{KEY}.tokens')
  if not isinstance(tokens, list) or not tokens:
    raise BaseModelError(f'the GGUF file has no list {KEY}.tokens')
  if len(set(tokens)) != len(tokens):
    raise BaseModelError(f'{KEY}.tokens of the GGUF file repeats a token')
  return tokens


def _special_tokens(
  metadata: Mapping[str, Any], tokens: Sequence[str]
) -> dict[str, str]:
  special = {}
  for name, key in SPECIAL.items():
    token_id = metadata.get(f'{KEY}.{key}_token_id')
    if token_id is None:
      continue
    if not 0 <= token_id < len(tokens):
      raise BaseModelError(
        f'{KEY}.{key}_token_id of the GGUF file is {token_id}, but it has'
        f' {len(tokens)} tokens'
      )
    special[f'{name}_token'] = tokens[token_id]
  return special


def _byte_level(
  metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, bool]:
  """Returns byte-level BPE, and whether a start token is its habit."""
  pre = metadata.get(f'{KEY}.pre', 'default')
  if pre not in CUTS:
    raise BaseModelError(
      f"the GGUF file's tokenizer cuts text the way {pre!r}, which is not known"
      f' here ({", ".join(CUTS)} are); load the model from its Hugging'
      ' Face folder instead'
    )
  cut = CUTS[pre]
  vocab = {token: i for i, token in enumerate(tokens)}
  pairs = _merges(metadata.get(f'{KEY}.merges', ()), vocab)
  backend = tokenizers.Tokenizer(
    models.BPE(vocab, pairs, ignore_merges=cut.ignore_merges)
  )
  if cut.normalizer:
    backend.normalizer = cut.normalizer
  backend.pre_tokenizer = cut.pre_tokenizer
  backend.decoder = decoders.ByteLevel()
  return backend, cut.adds_bos


def _merges(
  merges: Sequence[str], vocab: Mapping[str, int]
) -> list[tuple[str, ...]]:
  pairs = [tuple(merge.split(' ')) for merge in merges]
  for pair in pairs:
    if len(pair) != 2 or not vocab.keys() >= {*pair, ''.join(pair)}:
      raise BaseModelError(
        f'{KEY}.merges of the GGUF file has the entry {" ".join(pair)!r},'
        ' which does not join two of its tokens to a third'
      )
  return pairs


def _sentence_piece(
  metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tokenizers.Tokenizer:
  """Returns BPE over characters, with bytes for those that are no tokens."""
  scores = np.asarray(metadata.get(f'{KEY}.scores', ()))
  types = np.asarray(metadata.get(f'{KEY}.token_type', ()))
  if not len(scores) == len(types) == len(tokens):
    raise BaseModelError(
      f'the GGUF file has {len(tokens)} tokens, but {len(scores)} {KEY}.scores'
      f' and {len(types)} {KEY}.token_type'
    )
  vocab = {token: i for i, token in enumerate(tokens)}
  merged = np.flatnonzero(np.isin(types, (NORMAL, USER_DEFINED, UNUSED)))
  best_first = merged[np.argsort(-scores[merged], kind='stable')]
  pairs = [
    (token[:i], token[i:])
    for token in map(tokens.__getitem__, best_first)
    for i in range(1, len(token))
    if token[:i] in vocab and token[i:] in vocab
  ]
  unknown = metadata.get(f'{KEY}.unknown_token_id', 0)
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab,
      pairs,
      unk_token=tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  steps = [normalizers.Replace(' ', SPELLED_SPACE)]
  spelled = [
    decoders.Replace(SPELLED_SPACE, ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if metadata.get(f'{KEY}.add_space_prefix', True):
    steps.insert(0, normalizers.Prepend(SPELLED_SPACE))
    spelled.append(decoders.Strip(' ', 1, 0))
  backend.normalizer = normalizers.Sequence(steps)
  backend.decoder = decoders.Sequence(spelled)
  return backend


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

  backend.add_special_tokens(of_type(CONTROL, True))
  backend.add_tokens(of_type(USER_DEFINED, False))


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
