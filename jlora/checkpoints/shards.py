"""A model's safetensors files: which are accepted, and what they hold."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  # numpy learns bfloat16 from it
import safetensors

from jlora.checkpoints.weights import listed
from jlora.errors import BaseModelError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

# Names of dtypes in safetensors and in numpy.
DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}

_PICKLE_PATTERNS = ('*.bin', '*.pt', '*.pth', '*.ckpt')
_LARGEST_JSON = 1 << 26  # bytes; an index of a large model has a megabyte
_SHARD = re.compile(r'[\w-][\w.-]*\.safetensors')  # a name without folders

Header = dict[str, tuple[tuple[int, ...], str]]


def check_folder(folder: pathlib.Path) -> None:
  """Checks what a folder holds by its file names alone.

  Args:
    folder: An existing folder.

  Raises:
    BaseModelError: config.json or the safetensors weights are missing.
  """
  if not (folder / 'config.json').is_file():
    raise BaseModelError(
      f'{folder} has no config.json; name the folder that a model was saved to'
      ' with save_pretrained, or a .gguf file'
    )
  if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
    return
  for pattern in _PICKLE_PATTERNS:
    for path in sorted(folder.glob(pattern)):
      raise BaseModelError(pickle_refusal(path))
  raise BaseModelError(f'{folder} has neither {SINGLE} nor {INDEX}')


def pickle_refusal(path: pathlib.Path) -> str:
  """Returns why a pickle is not read, and how to convert it."""
  return (
    f'{path} is a pickle, which can run code when it is read; convert the'
    ' model once, where you trust it: load it in transformers and call'
    ' save_pretrained(FOLDER), which writes safetensors'
  )


def load_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object of moderate size, or raises a BaseModelError."""
  try:
    size = path.stat().st_size
    if size > _LARGEST_JSON:
      raise BaseModelError(f'{path} has {size} bytes, which is no such file')
    fields = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise BaseModelError(f'{path} cannot be read: {error}') from error
  if not isinstance(fields, dict):
    raise BaseModelError(f'{path} must hold an object, not {fields!r:.60}')
  return fields


def locate(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the file of every tensor, which lies in the folder.

  Args:
    folder: Holds `model.safetensors`, or an index and its shards.

  Raises:
    BaseModelError: The index is malformed, points elsewhere, or names other
      files than there are.
  """
  single = folder / SINGLE
  if single.is_file():
    return dict.fromkeys(read_header(single), single)
  places = load_json(folder / INDEX).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise BaseModelError(f'{folder / INDEX} has no weight_map')
  files = {str(file) for file in places.values()}
  for file in sorted(files):
    if not _SHARD.fullmatch(file):
      raise BaseModelError(
        f'{folder / INDEX} points to {file!r}, which is no safetensors file'
        ' inside the folder'
      )
  present = {path.name for path in folder.glob('model-*-of-*.safetensors')}
  if missing := {file for file in files if not (folder / file).is_file()}:
    raise BaseModelError(f'{folder} lacks {listed(missing)} of its index')
  if extra := present - files:
    raise BaseModelError(
      f'{folder} holds {listed(extra)}, which its index does not name'
    )
  return {name: folder / file for name, file in places.items()}


def read_header(path: pathlib.Path) -> Header:
  """Returns shape and dtype by name.

  The library checks offsets and sizes; it keeps one of two tensors of the same
  name, so names are checked here.

  Args:
    path: A safetensors file.

  Raises:
    BaseModelError: The file is damaged.
  """
  try:
    with safetensors.safe_open(path, 'numpy'), path.open('rb') as file:
      size = int.from_bytes(file.read(8), 'little')
      pairs = json.loads(file.read(size), object_pairs_hook=list)
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise BaseModelError(
      f'{path} is no whole safetensors file: {error}'
    ) from error
  found: Header = {}
  for name, entry in pairs:
    if name == '__metadata__':
      continue
    if name in found:
      raise BaseModelError(f'{path} holds the tensor {name!r} twice')
    entry = dict(entry)
    found[name] = tuple(entry['shape']), entry['dtype']
  return found


def check_dtypes(where: Any, header: Header) -> None:
  """Checks that tensors are of dtypes that are read.

  Args:
    where: The file or folder, for the message.
    header: Shape and dtype by name.

  Raises:
    BaseModelError: One is not.
  """
  for name, (_, kind) in header.items():
    if kind not in DTYPES:
      raise BaseModelError(
        f'{where}: {name} has dtype {kind}; readable are {", ".join(DTYPES)}'
      )


def read_headers(
  folder: pathlib.Path, files: Mapping[str, pathlib.Path]
) -> Header:
  """Returns shape and dtype of all tensors of a folder.

  Args:
    folder: For messages.
    files: From `locate`.

  Raises:
    BaseModelError: A file is damaged, or holds other tensors than the index
      places there.
  """
  found: Header = {}
  for path in sorted(set(files.values())):
    header = read_header(path)
    placed = {name for name, file in files.items() if file == path}
    if wrong := header.keys() ^ placed:
      raise BaseModelError(
        f'{folder}: {INDEX} and {path.name} disagree about {listed(wrong)}'
      )
    found.update(header)
  return found
