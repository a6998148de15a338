"""Hugging Face folders, read tensor by tensor: config.json and safetensors."""

import functools
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors

from jlora.checkpoints import bitsandbytes, tokenizers
from jlora.checkpoints.shards import (
  DTYPES,
  Header,
  check_dtypes,
  check_folder,
  load_json,
  locate,
  read_headers,
)
from jlora.checkpoints.stored_codes import StoredCodes, find_codes
from jlora.checkpoints.weights import (
  Index,
  check_sizes,
  check_tensors,
  parts_of,
  stored_shapes,
)
from jlora.errors import BaseModelError
from jlora.models import layout
from jlora.models.families import FAMILIES
from jlora.models.hf_config import read_config, usual_fields

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

_HEAD = 'lm_head.weight'


class HfModel:
  """A model in a Hugging Face folder.

  Attributes:
    folder: The folder.
    config: The decoder's sizes.
    packed: Weights that bitsandbytes stored in 4 bits, by name.
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
    self._plain = FAMILIES[self.config.family].plain
    self._dtypes = self._check_tensors(read_headers(folder, self._files))

  @functools.cached_property
  def codes(self) -> StoredCodes | None:
    """Which leaves are in 4 bits, as they are stored; None for none."""
    return find_codes(self.config, self.packed)

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
    """The dtypes of the weights, and how those in 4 bits are quantized."""
    dense = sorted(DTYPES[kind] for kind in self._dtypes)
    recipes = sorted({str(tensor.recipe) for tensor in self.packed.values()})
    return ' and '.join(recipes + dense)

  @property
  def half_dtype(self) -> str | None:
    """Which dtype of 16 bits weights have here; None where none has one."""
    found = {DTYPES[kind] for kind in self._dtypes}
    return next((x for x in ('bfloat16', 'float16') if x in found), None)

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
    if name in self.packed:
      return self._decode(name, index).astype(dtype, copy=False)
    name = self._stored[name]
    with safetensors.safe_open(self._files[name], 'numpy') as file:
      return _rounded(file.get_slice(name), index, np.dtype(dtype))

  def _read_items(self, name: str, start: int, stop: int) -> np.ndarray:
    """Returns items of a flattened tensor as they are stored."""
    with safetensors.safe_open(self._files[name], 'numpy') as file:
      return file.get_slice(name)[start:stop].reshape(-1)

  def _decode(self, name: str, index: Index | None) -> np.ndarray:
    """Returns a part of a tensor in 4 bits, which lies as [out, in] always."""
    tensor = self.packed[name]
    if not self._plain:
      return tensor.decode(index)
    return tensor.decode(index and index[::-1]).T

  def _check_tensors(self, header: Header) -> set[str]:
    """Checks all headers against the config and returns the dtypes."""
    packed = bitsandbytes.find_packed(self.folder, header, self._read_items)
    self._name(n for n in header if not bitsandbytes.is_part(n, packed))
    self.packed = {n: packed[x] for n, x in self._stored.items() if x in packed}
    dense = {n: header[x] for n, x in self._stored.items() if x not in packed}
    check_dtypes(self.folder, dense)
    found = {name: shape for name, (shape, _) in dense.items()}
    for name, tensor in self.packed.items():
      found[name] = tensor.shape[::-1] if self._plain else tensor.shape
    wanted = stored_shapes(self.config)
    tied_head = self.config.tie_embeddings and found.pop(_HEAD, None)
    check_tensors(self.folder, found, wanted)
    if tied_head:
      self._check_tied_head()
    return {dense[name][1] for name in wanted.keys() & dense.keys()}

  def _name(self, names: Iterable[str]) -> None:
    """Notes the stored name of each tensor; a prefix may be missing."""
    names, family = list(names), FAMILIES[self.config.family]
    bare = not any(name.startswith(family.prefix) for name in names)
    # Some versions of transformers save what is computed, not learned.
    self._stored = {
      family.prefix + name if bare and name != _HEAD else name: name
      for name in names
      if not name.endswith(family.buffers)
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


def _rounded(stored: Any, index: Index | None, dtype: np.dtype) -> np.ndarray:
  """Returns a part of a tensor, never all of it in two dtypes at once."""
  shape = stored.get_shape()
  first, *rest = index or tuple(slice(0, n) for n in shape)
  if DTYPES[stored.get_dtype()] == dtype.name:
    return stored[first, *rest]
  rows = range(shape[0])[first]
  sizes = (len(range(n)[s]) for n, s in zip(shape[1:], rest, strict=True))
  result, at = np.empty((len(rows), *sizes), dtype), rows.start
  for part in parts_of(result):
    part[...] = stored[at : at + len(part), *rest].astype(dtype)
    at += len(part)
  return result


def _is_of_transformers(maps: Any, kind: Any) -> bool:
  """Whether code beside a model defines what transformers has itself.

  So it is where a family was published before transformers knew it.

  Args:
    maps: `auto_map` of config.json.
    kind: `model_type` there.
  """
  if not maps:
    return True
  if kind not in FAMILIES or not isinstance(maps, dict):
    return False
  family = FAMILIES[kind].architecture.removesuffix('ForCausalLM')
  names = [str(place).rpartition('.')[2] for place in maps.values()]
  return all(name.startswith(family) for name in names)


def _load_config(folder: pathlib.Path) -> dict[str, Any]:
  fields = load_json(folder / 'config.json')
  maps = fields.get('auto_map') or {}
  if not _is_of_transformers(maps, fields.get('model_type')):
    raise BaseModelError(
      f'{folder}/config.json has auto_map={maps!r:.200}, code that would come'
      ' with the model; it is never run. Remove the field if transformers'
      ' computes the model with its own class'
    )
  return bitsandbytes.without_quantization(folder, fields)
