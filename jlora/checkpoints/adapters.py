"""Adapters on disk: what they hold, which base they belong to, their files."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints import folders
from jlora.core import tree
from jlora.core.decompositions import Start
from jlora.core.lazy import densify, is_lazy
from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec
from jlora.errors import AdapterError, ConfigError
from jlora.version import __version__

CONFIG_FILE = 'adapter_config.json'
TENSORS_FILE = 'adapter_model.safetensors'
METADATA_FILE = 'jlora_metadata.json'
START_FILE = 'jlora_start.safetensors'

_FILES = {CONFIG_FILE, TENSORS_FILE, METADATA_FILE, START_FILE}
_LARGEST_JSON = 1 << 20  # bytes; a real one has a few kilobytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
  """What an adapter's files hold.

  Attributes:
    trainable: As from `jlora.partition`, with float32 arrays on the host.
    spec: What `trainable` fits, for `jlora.combine` and `jlora.merge`. Its
      patterns are paths of leaves and layers.
    metadata: What `jlora_metadata.json` says; empty where there is none.
    base_leaves: Leaves of the base by path that the files repeat, as PEFT does
      with an embedding that has a low-rank pair; see `check_base_leaves`.
    starts: How the low-rank pairs started, by path, where the tensors alone do
      not say it.
  """

  trainable: dict[str, Any]
  spec: LoraSpec
  metadata: dict[str, Any]
  base_leaves: dict[str, np.ndarray]
  starts: Mapping[str, Start] = dataclasses.field(default_factory=dict)


def check_base_leaves(adapter: Adapter, params: Any) -> None:
  """Checks that the base has the leaves that an adapter's files repeat.

  PEFT puts what the files repeat in place of the base's own; jlora does not.

  Args:
    adapter: The adapter.
    params: Parameters of the base.

  Raises:
    AdapterError: A leaf is another one, beyond rounding to bfloat16.
  """
  leaves = tree.leaves_by_path(params, is_lazy)
  for path, copy in adapter.base_leaves.items():
    leaf = np.asarray(densify(leaves[path], np.float32))
    if not np.allclose(leaf, copy, rtol=2**-8, atol=0):
      raise AdapterError(
        f'the adapter was saved with {path!r} of its base, which is not that of'
        f' this base: they differ by {np.abs(leaf - copy).max():.3g}; use the'
        ' base it was trained on'
      )


def check_fingerprint(
  metadata: Mapping[str, Any],
  base_sha256: str,
  *,
  allow_other_base: bool = False,
) -> bool:
  """Checks that an adapter was trained on the base that it is used on.

  Args:
    metadata: The adapter's, whose `base_sha256` is compared.
    base_sha256: Fingerprint of the base at hand.
    allow_other_base: Whether another base is accepted.

  Returns:
    Whether both are known to be the same: False where the adapter names no
    base, as those from PEFT do not, and where another one was accepted.

  Raises:
    AdapterError: The adapter was trained on another base.
  """
  trained_on = metadata.get('base_sha256')
  if trained_on == base_sha256:
    return True
  if trained_on is None or allow_other_base:
    return False
  raise AdapterError(
    f'the adapter was trained on a base with sha256 {trained_on}, but this base'
    f' has {base_sha256}; use the base it was trained on, or allow another one'
    ' with allow_other_base=True'
  )


def write_files(
  folder: str | os.PathLike[str],
  files: Mapping[str, bytes],
  metadata: Mapping[str, Any],
) -> None:
  """Writes an adapter's files and `jlora_metadata.json` with their digests.

  Args:
    folder: Created, or replaced as a whole if it holds an adapter.
    files: Content by file name.
    metadata: What else is recorded; the version of jlora is added.

  Raises:
    ConfigError: The folder holds other files than an adapter's.
    CheckpointError: The disk refused; the previous adapter is kept.
  """
  fields = {
    'jlora_version': __version__,
    **metadata,
    'digests': {name: _sha256(content) for name, content in files.items()},
  }
  content = {**files, METADATA_FILE: to_json(fields)}
  with folders.replacing(folder, known=is_adapter_file) as new:
    for name, data in content.items():
      (new / name).write_bytes(data)


def is_adapter_file(name: str) -> bool:
  """Whether a file is one of those that `write_files` may replace."""
  return name in _FILES


def find_files(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Checks that the files of an adapter are there, and that none is pickled.

  Args:
    folder: An adapter's, written by PEFT or jlora.

  Returns:
    Its absolute path.

  Raises:
    AdapterError: A file is missing, or the tensors are pickled.
  """
  folder = pathlib.Path(folder).resolve()
  folders.restore_folder(folder)
  if not (folder / CONFIG_FILE).is_file():
    raise AdapterError(f'{folder} holds no adapter: {CONFIG_FILE} is missing')
  if (folder / TENSORS_FILE).is_file():
    return folder
  pickled = folder / 'adapter_model.bin'
  if pickled.exists():
    raise AdapterError(
      f'{pickled} is a pickle, which can run code when it is read; load it with'
      f' PEFT and save it again, which writes {TENSORS_FILE}'
    )
  raise AdapterError(f'{folder} holds no adapter: {TENSORS_FILE} is missing')


def load_metadata(folder: pathlib.Path) -> dict[str, Any]:
  """Reads `jlora_metadata.json` and compares the digests in it.

  Args:
    folder: From `find_files`.

  Returns:
    The fields without the digests; empty where there is no such file.

  Raises:
    AdapterError: A file is not the one that was written.
  """
  path = folder / METADATA_FILE
  if not path.exists():
    return {}
  metadata = load_json(path)
  digests = metadata.pop('digests', None)
  if not isinstance(digests, dict):
    raise AdapterError(f"{path} lacks the field 'digests'; it is not whole")
  for name in sorted({CONFIG_FILE, TENSORS_FILE, *digests}):
    path = folder / pathlib.PurePath(name).name
    if not path.is_file():
      raise AdapterError(f'{path} is missing; restore it')
    found, expected = _sha256(path.read_bytes()), digests.get(name)
    if found != expected:
      raise AdapterError(
        f'{folder / name} has sha256 {found}, but {expected} was written: it is'
        f' damaged; if it was changed on purpose, delete {METADATA_FILE}'
      )
  return metadata


def trained_spec(metadata: Mapping[str, Any]) -> LoraSpec:
  """Returns the spec that an adapter was trained with.

  Args:
    metadata: The adapter's; one that says nothing stands for plain LoRA.

  Raises:
    AdapterError: What it says is no spec.
  """
  return _spec(LoraSpec, metadata, 'lora', {}) or LoraSpec()


def trained_quant(metadata: Mapping[str, Any]) -> QuantSpec | None:
  """Returns how the base of an adapter was quantized; None for not at all.

  Args:
    metadata: The adapter's.

  Raises:
    AdapterError: What it says is no spec.
  """
  return _spec(QuantSpec, metadata, 'quantization', None)


def _spec(kind: Any, metadata: Mapping[str, Any], field: str, none: Any) -> Any:
  fields = metadata.get(field, none)
  if fields == none:
    return None
  try:
    return kind(**fields)
  except (TypeError, ConfigError) as error:
    raise AdapterError(
      f'{METADATA_FILE} has {field}={fields!r:.80}, which is no'
      f' {kind.__name__} ({error}); restore the file'
    ) from error


def to_json(fields: Mapping[str, Any]) -> bytes:
  """Returns fields as a file's content: the same bytes for the same fields.

  Args:
    fields: What JSON can hold; NaN is refused with a ValueError.
  """
  text = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False)
  return text.encode() + b'\n'


def load_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object of at most 1 MiB.

  Args:
    path: The file.

  Raises:
    AdapterError: The file is larger, no JSON or no object.
  """
  size = path.stat().st_size
  if size > _LARGEST_JSON:
    raise AdapterError(
      f'{path} has {size} bytes; a file of this kind has at most'
      f' {_LARGEST_JSON}'
    )
  try:
    fields = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise AdapterError(f'{path} is no JSON: {error}') from error
  if not isinstance(fields, dict):
    raise AdapterError(f'{path} must hold a JSON object, not {fields!r:.60}')
  return fields


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()
