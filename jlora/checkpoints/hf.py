"""Hugging Face folders, read tensor by tensor: config.json and safetensors."""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors

from jlora.checkpoints import tokenizers
from jlora.checkpoints.folders import replacing
from jlora.checkpoints.shards import (
  DTYPES,
  SINGLE,
  Header,
  check_folder,
  load_json,
  locate,
  read_headers,
  write_tensors,
)
from jlora.checkpoints.weights import (
  Index,
  check_sizes,
  check_tensors,
  listed,
  stored_shapes,
)
from jlora.core.tree import leaves_by_path
from jlora.errors import BaseModelError, CheckpointError, ConfigError
from jlora.models import layout
from jlora.models.config import DecoderConfig
from jlora.models.families import FAMILIES
from jlora.models.hf_config import read_config, usual_fields, write_config

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SAVED = {  # what a saved model consists of
  'config.json',
  'generation_config.json',
  'model.safetensors',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
}
_HEAD = 'lm_head.weight'


class HfModel:
  """A model in a Hugging Face folder.

  Attributes:
    folder: The folder.
    config: The decoder's sizes.
  """

  def __init__(self, folder: pathlib.Path):
    """Reads config.json and the headers of all safetensors files.

    Args:
      folder: Holds config.json and `model.safetensors`, whole or in shards.

    Raises:
      BaseModelError: The folder is not whole, is of a family that is not
        supported, or asks for code of its own to be run.
    """
    check_folder(folder)
    self.folder = folder
    self._files = locate(folder)
    fields = _load_config(folder)
    check_sizes(folder / 'config.json', usual_fields(fields), len(self._files))
    self.config = read_config(fields)
    self._dtypes = self._check_tensors()

  @property
  def title(self) -> str:
    """The folder's name."""
    return self.folder.resolve().name

  @property
  def paths(self) -> tuple[pathlib.Path, ...]:
    """The files that hold the weights."""
    return tuple(sorted(set(self._files.values())))

  @property
  def precision(self) -> str:
    """The dtype, or dtypes, of the weights."""
    return ' and '.join(sorted(DTYPES[kind] for kind in self._dtypes))

  @property
  def eos_token_ids(self) -> tuple[int, ...]:
    """Ids that generation_config.json, or else config.json, ends at."""
    for name in ('generation_config.json', 'config.json'):
      path = self.folder / name
      found = load_json(path).get('eos_token_id') if path.exists() else None
      if found is not None:
        return tuple(found) if isinstance(found, list) else (found,)
    return ()

  def load_tokenizer(self) -> 'PreTrainedTokenizerFast':
    """Loads the tokenizer of the folder."""
    return tokenizers.from_folder(self.folder)

  def read(
    self, name: str, dtype: np.dtype | type, index: Index | None = None
  ) -> np.ndarray:
    """Returns a weight, or a part of it, as stored and rounded to `dtype`.

    Args:
      name: Such as `model.layers.3.self_attn.q_proj.weight`.
      dtype: What the values are rounded to.
      index: One slice an axis, which is all that is read; None is everything.
    """
    name = self._stored[name]
    with safetensors.safe_open(self._files[name], 'numpy') as file:
      part = file.get_slice(name)[index] if index else file.get_tensor(name)
      return part.astype(dtype, copy=False)

  def _check_tensors(self) -> set[str]:
    """Checks all headers against the config and returns the dtypes."""
    header = read_headers(self.folder, self._files)
    self._add_prefix(header)
    # Some versions of transformers save what is computed, not learned.
    buffers = FAMILIES[self.config.family].buffers
    found = {
      name: header[stored][0]
      for name, stored in self._stored.items()
      if not name.endswith(buffers)
    }
    wanted = stored_shapes(self.config)
    tied_head = self.config.tie_embeddings and found.pop(_HEAD, None)
    check_tensors(self.folder, found, wanted)
    if tied_head:
      self._check_tied_head()
    return {header[self._stored[name]][1] for name in wanted}

  def _add_prefix(self, header: Header) -> None:
    """Notes the stored name of each tensor; a prefix may be missing."""
    prefix = FAMILIES[self.config.family].prefix
    bare = not any(name.startswith(prefix) for name in header)
    self._stored = {
      prefix + name if bare and name != _HEAD else name: name for name in header
    }

  def _check_tied_head(self) -> None:
    """A head that is saved although it is tied must be the embedding."""
    head = self.read(_HEAD, np.float32)
    embedding = layout.module_of(self.config, 'embed') + '.weight'
    if not np.array_equal(head, self.read(embedding, np.float32)):
      raise BaseModelError(
        f'{self.folder} holds an output head that differs from the embedding,'
        ' but config.json ties them; set tie_word_embeddings to false there'
      )


def _load_config(folder: pathlib.Path) -> dict[str, Any]:
  fields = load_json(folder / 'config.json')
  if 'auto_map' in fields:
    raise BaseModelError(
      f'{folder}/config.json has auto_map={fields["auto_map"]!r}, code that'
      ' would come with the model; it is never run. Remove the field if the'
      ' model is a plain Llama'
    )
  if quantized := fields.get('quantization_config'):
    raise BaseModelError(
      f'{folder} is quantized ({quantized!r:.80}); name the unquantized model'
      ' and let jlora quantize it'
    )
  return fields


def save_folder(
  folder: str | os.PathLike[str],
  config: DecoderConfig,
  params: Mapping[str, Any] | Iterable[tuple[str, Any]],
  tokenizer: 'PreTrainedTokenizerBase',
  dtype: Any = 'float32',
  *,
  eos_token_ids: Sequence[int] = (),
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

  Raises:
    ConfigError: `dtype` cannot hold the weights, or the folder holds
      something else.
    CheckpointError: The leaves are not those of `config`, or the disk refused;
      what was there before is kept.
  """
  folder = pathlib.Path(folder).resolve()
  dtype = _check_dtype(dtype)
  _check_replaceable(folder)
  with replacing(folder) as new:
    write_tensors(
      new / SINGLE, stored_shapes(config), dtype, _stored(config, params)
    )
    _write_metadata(new, config, tokenizer, dtype, eos_token_ids)


def _check_dtype(dtype: Any) -> np.dtype:
  if np.dtype(dtype).name not in DTYPES.values():
    raise ConfigError(
      f'weights cannot be saved as {dtype!r}; use {", ".join(DTYPES.values())}'
    )
  return np.dtype(dtype)


def _check_replaceable(folder: pathlib.Path) -> None:
  if folder.is_file():
    raise ConfigError(f'{folder} is a file; name a new folder')
  found = {path.name for path in folder.iterdir()} if folder.exists() else set()
  if others := found - _SAVED:
    raise ConfigError(
      f'{folder} would be replaced, but holds {listed(others)}, which a saved'
      ' model does not; name a new folder'
    )


def _stored(
  config: DecoderConfig,
  params: Mapping[str, Any] | Iterable[tuple[str, Any]],
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields tensors with Hugging Face's names and layout."""
  leaves = {weight.path: weight for weight in layout.weights(config)}
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
  config: DecoderConfig,
  tokenizer: 'PreTrainedTokenizerBase',
  dtype: np.dtype,
  eos_token_ids: Sequence[int],
) -> None:
  ids = {
    'bos_token_id': tokenizer.bos_token_id,
    'eos_token_id': list(eos_token_ids) or tokenizer.eos_token_id,
    'pad_token_id': tokenizer.pad_token_id,
  }
  fields = {**write_config(config), **ids, 'dtype': dtype.name}
  _write_json(folder / 'config.json', fields)
  _write_json(folder / 'generation_config.json', ids)
  tokenizer.save_pretrained(folder)
  # The name that every version of transformers knows its own class by.
  path = folder / 'tokenizer_config.json'
  _write_json(
    path, {**load_json(path), 'tokenizer_class': 'PreTrainedTokenizerFast'}
  )


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')
