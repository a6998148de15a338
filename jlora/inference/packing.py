"""What a run trained, in 4-bit codes as bitsandbytes stores them."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.adapters import CONFIG_FILE, load_json
from jlora.checkpoints.bases import Base, open_base
from jlora.checkpoints.folders import check_replaceable, replacing
from jlora.checkpoints.model_folders import is_saved, save_tokenizer
from jlora.checkpoints.packed_folders import choose_packed, save_packed
from jlora.checkpoints.peft import save_adapter
from jlora.checkpoints.shards import INDEX
from jlora.core.plan import is_frozen_leaf
from jlora.core.quantized import QuantizedArray
from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.inference.exports import Files
from jlora.inference.merging import Distance, MergedLeaf
from jlora.inference.requantizing import Requantized
from jlora.inference.tuned import Tuned
from jlora.models import families


def write_packed(
  tuned: Tuned, out: os.PathLike[str], files: Files
) -> list[str]:
  """Writes the base in the codes that were trained on, and the adapter beside.

  Args:
    tuned: The model.
    out: The folder of the base; the adapter's has `-adapter` behind its name.
    files: How they are written. A base that is stored in 4 bits is copied.

  Returns:
    What there is to say, a line each.

  Raises:
    ConfigError: The base is not in 4 bits, or bitsandbytes has no form for it.
  """
  out = pathlib.Path(out).resolve()
  adapter = beside(out)
  check_replaceable(out, is_saved)
  if tuned.spec is not None:
    check_beside(adapter)
  if tuned.base.codes:
    _copy(tuned, out)
    said = ['the base is stored in 4 bits already: its files are copied']
  else:
    require_codes(tuned.base, tuned.codes)
    said = [_write_codes(tuned, tuned.codes, out, files)]
  if tuned.spec is None:
    return said
  _write_beside(tuned, adapter, out)
  return [
    *said,
    f'the adapter for it, named {out.name!r} there, is in {adapter}',
  ]


def write_requantized(
  tuned: Tuned, out: os.PathLike[str], files: Files, found: Requantized
) -> list[str]:
  """Writes a merged model in codes.

  Args:
    tuned: The model.
    out: The folder.
    files: How they are written.
    found: From `requantize`.

  Returns:
    What there is to say, a line each.

  Raises:
    ConfigError: As in `write_packed`.
  """
  out = pathlib.Path(out)
  return [str(found), _write_codes(tuned, found.codes, out, files, found.rest)]


def require_codes(base: Base, codes: Mapping[str, Any]) -> None:
  """Requires that some kernels of a base are in codes.

  Args:
    base: The base.
    codes: Those that are, by path.

  Raises:
    ConfigError: None is.
  """
  if not codes:
    raise ConfigError(
      f'{base.name} is in full precision here, and has no codes to write'
    )


def _copy(tuned: Tuned, out: pathlib.Path) -> None:
  """Copies a base's files."""
  source = tuned.base.model.folder.resolve()
  if out == source:
    raise ConfigError(f'{out} is the base itself; name another folder')
  names = (INDEX, 'config.json', 'generation_config.json')
  paths = [source / name for name in names if (source / name).is_file()]
  with replacing(out, known=is_saved) as new:
    for path in (*tuned.base.model.paths, *paths):
      shutil.copyfile(path, new / path.name)
    save_tokenizer(new, tuned.base.tokenizer)


def _write_codes(
  tuned: Tuned,
  codes: Mapping[str, QuantizedArray],
  out: pathlib.Path,
  files: Files,
  merged: Mapping[str, Any] | None = None,
) -> str:
  """Writes codes, and all other leaves of the base or of a merged model.

  Of a base, a leaf that an adapter began as a part of is the one without it.
  """
  packed = choose_packed(tuned.base.config, codes)
  decoded = {path: codes[path] for path in codes.keys() - packed.keys()}
  frozen = leaves_by_path(tuned.frozen, is_frozen_leaf)
  begun = {path: frozen[path] for path in tuned.starts if path not in packed}
  save_packed(
    out,
    tuned.base.config,
    packed,
    _rest(tuned, packed, {**begun, **decoded, **(merged or {})}),
    tuned.base.tokenizer,
    files.dtype,
    eos_token_ids=tuned.base.eos_token_ids,
    max_shard_size=files.max_shard_size,
  )
  text = f'{len(packed)} leaves are written in the codes they are in'
  if decoded:
    text += (
      f'; {len(decoded)} more, whose rows are no whole number of blocks, are'
      f' decoded to {files.dtype}'
    )
  return text


def _rest(
  tuned: Tuned, packed: Mapping[str, Any], others: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
  """Yields the leaves that are not in codes, those of `others` ahead."""
  uncounted = Distance()
  for path, stored in tuned.base.leaves().items():
    if path in others:
      yield path, MergedLeaf(others[path], np.dtype('float32'), uncounted)
    elif path not in packed:
      yield path, stored


def _write_beside(
  tuned: Tuned, adapter: pathlib.Path, out: pathlib.Path
) -> None:
  """Writes the adapter for the codes in `out`, which it was trained on.

  Where it began as a part of the base, codes that were written are already
  without that, and those that were copied are not.
  """
  base, spec, starts, quant = open_base(str(out)), tuned.spec, {}, tuned.quant
  if tuned.base.codes:
    starts = tuned.starts
  else:
    spec, quant = dataclasses.replace(spec, init='lora'), base.codes.quant
    quant = quant and families.resolve(quant, base.config)
  metadata = {
    **tuned.metadata,
    'base_sha256': base.sha256,
    'quantization': quant and dataclasses.asdict(quant),
  }
  metadata.pop('lora', None)
  save_adapter(
    adapter,
    tuned.trainable,
    spec,
    base.config,
    base_name=out.name,
    metadata=metadata,
    starts=starts,
  )


def beside(out: pathlib.Path) -> pathlib.Path:
  """Returns where the adapter of a base in `out` is written."""
  return out.with_name(f'{out.name}-adapter')


def check_beside(adapter: pathlib.Path) -> None:
  """Requires that an adapter's place is free, or was written as such.

  Args:
    adapter: From `beside`.

  Raises:
    ConfigError: It holds something else.
  """
  if not adapter.exists():
    return
  path, name = adapter / CONFIG_FILE, adapter.name.removesuffix('-adapter')
  fields = load_json(path) if path.is_file() else {}
  if fields.get('base_model_name_or_path') != name:
    raise ConfigError(
      f'{adapter}, where the adapter would be written, holds something else'
      f' than the adapter of a base {name!r}; name another folder'
    )
