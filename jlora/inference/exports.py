"""What a run trained, written in forms that other programs open."""

import dataclasses
import os
import pathlib

import numpy as np

from jlora.checkpoints.gguf_writer import plan_gguf, save_gguf
from jlora.checkpoints.model_folders import (
  MAX_SHARD_SIZE,
  check_dtype,
  save_folder,
)
from jlora.checkpoints.peft import save_adapter
from jlora.core.tree import nest
from jlora.errors import ConfigError
from jlora.inference.merging import Distance, merged_leaves
from jlora.inference.tuned import Tuned


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


def write_gguf(
  tuned: Tuned, out: os.PathLike[str], kind: str
) -> tuple[str, Distance]:
  """Writes base and adapter as one GGUF file.

  Args:
    tuned: The model.
    out: The file.
    kind: What weights are rounded to, in GGUF's words.

  Returns:
    What the file holds, in one line, and how far that is from what was
    trained.

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
  distance = Distance()
  leaves = merged_leaves(
    tuned, distance, into='trained', dtype=np.dtype('float32')
  )
  save_gguf(out, plan, nest(dict(leaves)), count=distance.add_rounding)
  return plan.describe(), distance


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
    raise ConfigError('there is no adapter to write')
  save_adapter(
    out,
    tuned.trainable,
    tuned.spec,
    tuned.base.config,
    base_name=tuned.base.name,
    metadata=tuned.metadata,
    starts=tuned.starts,
  )
