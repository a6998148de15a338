"""Continues prompts, in batches or as a stream of tokens and text."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.errors import ConfigError, DataError
from jlora.inference import decoding
from jlora.inference.sampling import Sampling
from jlora.models.config import DecoderConfig
from jlora.parallel import processes

# Prompts are padded to a multiple of this many tokens, so that few programs
# are compiled.
BUCKET = 32


def generate(
  apply: Callable[..., Any],
  params: Any,
  config: DecoderConfig,
  prompts: Sequence[np.ndarray],
  sampling: Sampling,
  *,
  eos_token_ids: Sequence[int],
  batch_size: int,
  dtype: Any,
) -> list[np.ndarray]:
  """Continues every prompt.

  One program is compiled for each length bucket that occurs, and kept for
  later calls with the same `apply` object.

  Args:
    apply: A decoder's `apply`, or its lifted form. It is called with
      `method='decode'`.
    params: The tree that `apply` takes as 'params'; leaves may be lazy.
    config: The decoder's.
    prompts: int [length] each, of one token or more.
    sampling: How tokens are chosen.
    eos_token_ids: Tokens that end a row.
    batch_size: Rows of a batch; a batch with fewer prompts is filled up with
      rows that are not looked at.
    dtype: Of the cache: what the decoder computes in.

  Returns:
    The new tokens of each prompt in the order of `prompts`, int32 [at most
    max_new_tokens], without the token that ended them.

  Raises:
    ConfigError: `batch_size` is below one.
    DataError: A prompt is not a row of tokens, holds an id that is not in the
      vocabulary, or could grow beyond the positions that the decoder was
      trained for.
  """
  if batch_size < 1:
    raise ConfigError(f'batch_size is {batch_size}; use 1 or more')
  setup = _make_setup(apply, config, sampling, eos_token_ids, dtype)
  key = jax.random.key(sampling.seed)
  results: list[Any] = [None] * len(prompts)
  for ids, width in _batches(_check(prompts, config, sampling), batch_size):
    tokens, lengths = _pad_left([prompts[i] for i in ids], batch_size, width)
    examples = np.zeros(batch_size, np.int32)
    examples[: len(ids)] = ids
    out = processes.whole(
      decoding.run(setup, params, tokens, lengths, examples, key)
    )
    for i, row in zip(ids, out, strict=False):
      results[i] = row[row != decoding.NOTHING]
  return results


def stream(
  apply: Callable[..., Any],
  params: Any,
  config: DecoderConfig,
  prompt: np.ndarray,
  sampling: Sampling,
  *,
  eos_token_ids: Sequence[int],
  dtype: Any,
) -> Iterator[int]:
  """Yields the tokens that follow one prompt as soon as each is known.

  Args:
    apply: As in `generate`.
    params: As in `generate`.
    config: The decoder's.
    prompt: int [length], of one token or more.
    sampling: How tokens are chosen.
    eos_token_ids: Tokens that end the stream; they are not yielded.
    dtype: Of the cache.

  Yields:
    What `generate` returns for this prompt alone, one token at a time.

  Raises:
    DataError: As in `generate`, when the first token is asked for.
  """
  setup = _make_setup(apply, config, sampling, eos_token_ids, dtype)
  (length,) = _check([prompt], config, sampling)
  tokens, lengths = _pad_left([prompt], 1, _bucket(length))
  key = jax.random.key(sampling.seed)
  rows, state = decoding.start_alone(
    setup, params, tokens, lengths, np.zeros(1, np.int32), key
  )
  for left in reversed(range(sampling.max_new_tokens)):
    if bool(state.done[0]):
      return
    yield int(state.token[0])
    if left:
      state = decoding.advance_alone(setup, params, rows, state)


def text_pieces(
  tokens: Iterable[int], decode: Callable[[list[int]], str]
) -> Iterator[str]:
  """Turns a stream of tokens into pieces of text that can be printed at once.

  A character whose bytes are spread over several tokens is held back until it
  is whole. Only the tokens since the last piece but one are decoded again.

  Args:
    tokens: The stream.
    decode: Returns the text of a list of tokens, with U+FFFD for bytes that
      are no character.

  Yields:
    Pieces that together are the text of all tokens.
  """
  known: list[int] = []  # tokens of the last piece: context for the next
  fresh: list[int] = []
  piece = ''
  for token in tokens:
    fresh.append(token)
    piece = decode(known + fresh)[len(decode(known)) :]
    if piece and not piece.endswith('\ufffd'):
      yield piece
      known, fresh, piece = fresh, [], ''
  if piece:
    yield piece


def _check(
  prompts: Sequence[np.ndarray], config: DecoderConfig, sampling: Sampling
) -> list[int]:
  """Returns the lengths of the prompts, or raises for one that cannot be."""
  lengths = []
  for i, prompt in enumerate(map(np.asarray, prompts)):
    whole = np.issubdtype(prompt.dtype, np.integer)
    if prompt.ndim != 1 or not prompt.size or not whole:
      raise DataError(
        f'prompt {i} is {prompt.dtype} of shape {prompt.shape}; give one or'
        ' more integer ids along one axis'
      )
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= config.vocab_size:
      raise DataError(
        f'prompt {i} holds the token {low if low < 0 else high}, but the'
        f' vocabulary has {config.vocab_size}; does the tokenizer belong to'
        ' this base?'
      )
    if prompt.size + sampling.max_new_tokens > config.max_positions:
      raise DataError(
        f'prompt {i} of {prompt.size} tokens with {sampling.max_new_tokens} new'
        f' ones exceeds the {config.max_positions} positions of this base;'
        ' shorten it or lower max_new_tokens'
      )
    lengths.append(prompt.size)
  return lengths


def _bucket(length: int) -> int:
  return -(-length // BUCKET) * BUCKET


def _batches(
  lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], int]]:
  """Yields the prompts of each batch, by index, and their padded length."""
  buckets: dict[int, list[int]] = {}
  for i, length in enumerate(lengths):
    buckets.setdefault(_bucket(length), []).append(i)
  for width, ids in sorted(buckets.items()):
    for first in range(0, len(ids), batch_size):
      yield ids[first : first + batch_size], width


def _pad_left(
  prompts: Sequence[np.ndarray], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns int32 [rows, width] tokens and [rows] lengths, 0 for no prompt."""
  tokens = np.zeros((rows, width), np.int32)
  lengths = np.zeros(rows, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, width - len(prompt) :] = prompt
    lengths[i] = len(prompt)
  return tokens, lengths


def _make_setup(
  apply: Callable[..., Any],
  config: DecoderConfig,
  sampling: Sampling,
  eos_token_ids: Sequence[int],
  dtype: Any,
) -> decoding.Setup:
  ends = tuple(sorted({int(token) for token in eos_token_ids}))
  # The seed is an argument of the program, not a part of it.
  sampling = dataclasses.replace(sampling, seed=0)
  return decoding.Setup(apply, config, sampling, ends, jnp.dtype(dtype))
