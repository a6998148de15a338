"""What a run trained, written in forms that other programs open."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.bases import open_base
from jlora.checkpoints.folders import replacing
from jlora.checkpoints.gguf_writer import plan_gguf, save_gguf
from jlora.checkpoints.model_folders import (
  MAX_SHARD_SIZE,
  check_dtype,
  is_saved,
  save_folder,
  save_tokenizer,
)
from jlora.checkpoints.packed_folders import choose_packed, save_packed
from jlora.checkpoints.peft import save_adapter
from jlora.checkpoints.shards import INDEX
from jlora.core.lazy import densify, is_lazy
from jlora.core.plan import is_frozen_leaf
from jlora.core.quantized import QuantizedArray, is_quantized
from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.inference.merging import Distance, merged_leaves
from jlora.inference.requantizing import Requantized
from jlora.inference.tuned import Tuned
from jlora.models import families


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
  """How a model's files are written.

  Attributes:
    dtype: Of weights that are not in codes: bfloat16, float16 or float32.
    max_shard_size: Of a file of weights.
  """

  dtype: str = 'bfloat16'
  max_shard_size: str | int = MAX_SHARD_SIZE


def write_merged(
  tuned: Tuned, out: os.PathLike[str], files: Files, *, into: str = 'trained'
) -> Distance:
  """Writes base and adapter as one model.

  Args:
    tuned: The model.
    out: The folder.
    files: How they are written.
    into: As in `merged_leaves`.

  Returns:
    How far what was written is from what was trained.

  Raises:
    ConfigError: As in `merged_leaves`, or the folder holds something else.
    CheckpointError: The disk refused.
  """
  distance, dtype = Distance(), check_dtype(files.dtype)
  save_folder(
    out,
    tuned.base.config,
    merged_leaves(tuned, distance, into=into, dtype=dtype),
    tuned.base.tokenizer,
    dtype,
    eos_token_ids=tuned.base.eos_token_ids,
    max_shard_size=files.max_shard_size,
  )
  return distance


def write_gguf(tuned: Tuned, out: os.PathLike[str], kind: str) -> str:
  """Writes base and adapter as one GGUF file.

  Args:
    tuned: The model.
    out: The file.
    kind: What weights are rounded to, in GGUF's words.

  Returns:
    What the file holds, in one line.

  Raises:
    ConfigError: GGUF cannot express the model or its tokenizer.
    CheckpointError: The disk refused.
  """
  plan = plan_gguf(
    tuned.base.config,
    tuned.base.tokenizer,
    kind,
    eos_token_ids=tuned.base.eos_token_ids,
    title=pathlib.Path(out).stem,
  )
  save_gguf(out, plan, tuned.dense('float32'))
  return plan.describe()


def write_peft(tuned: Tuned, out: os.PathLike[str]) -> None:
  """Writes the adapter for the base as it was named.

  Args:
    tuned: The model.
    out: The folder.

  Raises:
    ConfigError: There is no adapter, or the folder holds something else.
    AdapterError: PEFT has no form for it.
  """
  if tuned.spec is None:
    raise ConfigError('there is no adapter to write; use --to=merged')
  save_adapter(
    out,
    tuned.trainable,
    tuned.spec,
    tuned.base.config,
    base_name=tuned.base.name,
    metadata=tuned.metadata,
    starts=tuned.starts,
  )


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
  if tuned.base.codes:
    _copy(tuned, out)
    said = ['the base is stored in 4 bits already: its files are copied']
  else:
    said = [_write_codes(tuned, _codes_of(tuned), out, files)]
  if tuned.spec is None:
    return said
  adapter = out.with_name(f'{out.name}-adapter')
  _write_beside(tuned, adapter, out)
  return [*said, f'the adapter is beside it, in {adapter}']


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
  _codes_of(tuned)
  out = pathlib.Path(out)
  return [str(found), _write_codes(tuned, found.codes, out, files, found.rest)]


def _codes_of(tuned: Tuned) -> dict[str, QuantizedArray]:
  leaves = leaves_by_path(tuned.frozen, is_frozen_leaf)
  found = {path: x for path, x in leaves.items() if is_quantized(x)}
  if not found:
    raise ConfigError(
      f'{tuned.base.name} is in full precision here, and --to=bnb4 writes codes'
      ' that were trained on; use --to=merged, and quantize with bitsandbytes'
      ' what that writes'
    )
  return found


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
  """Writes codes, and all other leaves of the base or of a merged model."""
  packed = choose_packed(tuned.base.config, codes)
  decoded = {path: codes[path] for path in codes.keys() - packed.keys()}
  others = {**decoded, **(merged or {})}
  save_packed(
    out,
    tuned.base.config,
    packed,
    _rest(tuned, packed, others),
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
  for path, stored in tuned.base.leaves().items():
    if path not in packed:
      leaf = others.get(path, stored)
      yield path, densify(leaf, np.float32) if is_lazy(leaf) else leaf


def _write_beside(
  tuned: Tuned, adapter: pathlib.Path, out: pathlib.Path
) -> None:
  """Writes the adapter for the codes in `out`, which it was trained on.

  Where it began as a part of the base, the codes are already without that.
  """
  base = open_base(str(out))
  quant = base.codes.quant and families.resolve(base.codes.quant, base.config)
  metadata = {
    **tuned.metadata,
    'base_sha256': base.sha256,
    'quantization': quant and dataclasses.asdict(quant),
  }
  metadata.pop('lora', None)
  save_adapter(
    adapter,
    tuned.trainable,
    dataclasses.replace(tuned.spec, init='lora'),
    base.config,
    base_name=str(out),
    metadata=metadata,
  )
