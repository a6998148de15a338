"""Hugging Face folders as they are written, for transformers to load."""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.checkpoints.folders import replacing
from jlora.checkpoints.shard_files import (
  MAX_SHARD_SIZE,
  Entries,
  Entry,
  as_bytes,
  is_weights_file,
  write_model,
)
from jlora.checkpoints.shards import DTYPES, load_json
from jlora.checkpoints.weights import stored_shapes
from jlora.core.tree import leaves_by_path
from jlora.errors import CheckpointError, ConfigError
from jlora.models import layout
from jlora.models.config import DecoderConfig
from jlora.models.hf_config import write_config

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_SAVED = {  # what a saved model consists of, beside its weights
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
}


def save_folder(
  folder: str | os.PathLike[str],
  config: DecoderConfig,
  params: Mapping[str, Any] | Iterable[tuple[str, Any]],
  tokenizer: 'PreTrainedTokenizerBase',
  dtype: Any = 'float32',
  *,
  eos_token_ids: Sequence[int] = (),
  max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
  """Writes a model that `transformers` loads; tied heads stay tied.

  The folder is written beside its place and renamed, so that it is never
  half-written.

  Args:
    folder: Created, or replaced if it holds an earlier save.
    config: The decoder's sizes.
    params: The nested dict of dense arrays, or pairs of path and leaf in any
      order, which need not all be in memory at once.
    tokenizer: Saved with the model.
    dtype: What the weights are rounded to: float32, bfloat16 or float16.
    eos_token_ids: Ids that end a generation; empty for the tokenizer's own.
    max_shard_size: Of a file, such as '5GB'; a larger model has several.

  Raises:
    ConfigError: `dtype` cannot hold the weights, or the folder holds
      something else.
    CheckpointError: The leaves are not those of `config`, or the disk refused;
      what was there before is kept.
  """
  dtype = check_dtype(dtype)
  shapes = stored_shapes(config).items()
  save_tensors(
    folder,
    {**write_config(config), 'dtype': dtype.name},
    {name: Entry(shape, dtype) for name, shape in shapes},
    stored_tensors(config, params),
    tokenizer,
    eos_token_ids=eos_token_ids,
    max_shard_size=max_shard_size,
  )


def save_tensors(
  folder: str | os.PathLike[str],
  fields: Mapping[str, Any],
  entries: Entries,
  tensors: Iterable[tuple[str, np.ndarray]],
  tokenizer: 'PreTrainedTokenizerBase',
  *,
  eos_token_ids: Sequence[int] = (),
  max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
  """Writes a model's tensors as `save_folder` does.

  Args:
    folder: As there.
    fields: Of config.json, but the ids of special tokens.
    entries: Shape and dtype of every tensor by name.
    tensors: Each of them once, in any order.
    tokenizer: As there.
    eos_token_ids: As there.
    max_shard_size: As there.
  """
  folder, largest = pathlib.Path(folder).resolve(), as_bytes(max_shard_size)
  with replacing(folder, known=is_saved) as new:
    write_model(new, entries, tensors, largest=largest)
    _write_metadata(new, fields, tokenizer, eos_token_ids)


def check_dtype(dtype: Any) -> np.dtype:
  """Returns a dtype that weights are saved in, or raises a ConfigError."""
  if np.dtype(dtype).name not in DTYPES.values():
    raise ConfigError(
      f'weights cannot be saved as {dtype!r}; use {", ".join(DTYPES.values())}'
    )
  return np.dtype(dtype)


def is_saved(name: str) -> bool:
  """Whether a file is one of those that a saved model consists of."""
  return name in _SAVED or is_weights_file(name)


def stored_tensors(
  config: DecoderConfig,
  params: Mapping[str, Any] | Iterable[tuple[str, Any]],
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields tensors with Hugging Face's names and layout."""
  leaves = layout.by_path(config)
  if isinstance(params, Mapping):
    params = leaves_by_path(params).items()
  for path, leaf in params:
    if path not in leaves or tuple(leaf.shape) != leaves[path].shape:
      raise CheckpointError(f'{path} {leaf.shape} is no leaf of {config}')
    weight = leaves[path]
    for place, name in weight.places():
      tensor = np.asarray(leaf[place])
      yield name, tensor.T if weight.transposed else tensor


def _write_metadata(
  folder: pathlib.Path,
  fields: Mapping[str, Any],
  tokenizer: 'PreTrainedTokenizerBase',
  eos_token_ids: Sequence[int],
) -> None:
  ids = {
    'bos_token_id': tokenizer.bos_token_id,
    'eos_token_id': list(eos_token_ids) or tokenizer.eos_token_id,
    'pad_token_id': tokenizer.pad_token_id,
  }
  _write_json(folder / 'config.json', {**fields, **ids})
  _write_json(folder / 'generation_config.json', ids)
  save_tokenizer(folder, tokenizer)


def save_tokenizer(
  folder: pathlib.Path, tokenizer: 'PreTrainedTokenizerBase'
) -> None:
  """Writes a tokenizer beside a model.

  Args:
    folder: The model's.
    tokenizer: Saved with its chat template.
  """
  tokenizer.save_pretrained(folder)
  # The name that every version of transformers knows its own class by.
  path = folder / 'tokenizer_config.json'
  _write_json(
    path, {**load_json(path), 'tokenizer_class': 'PreTrainedTokenizerFast'}
  )


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')
