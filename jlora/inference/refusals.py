"""What an export cannot write, refused before any weights are read."""

import os
import pathlib
from collections.abc import Iterable

import numpy as np

from jlora.checkpoints.adapters import is_adapter_file
from jlora.checkpoints.bases import Base
from jlora.checkpoints.folders import check_replaceable
from jlora.checkpoints.gguf_writer import plan_gguf
from jlora.checkpoints.model_folders import is_saved
from jlora.checkpoints.packed_folders import choose_packed
from jlora.checkpoints.peft_selection import select
from jlora.checkpoints.stored_codes import agree
from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec, quantize_leaf
from jlora.core.split import make_split
from jlora.errors import ConfigError
from jlora.inference.merging import check_into
from jlora.inference.packing import beside, check_beside, require_codes
from jlora.models import layout


def check_outputs(
  to: str,
  out: str | os.PathLike[str],
  sources: Iterable[pathlib.Path],
  *,
  adapted: bool,
) -> None:
  """Requires that an export takes the place of nothing but an earlier one.

  Args:
    to: The form: merged, gguf, bnb4 or peft.
    out: The folder, or GGUF file, that is written.
    sources: Folders and files that it is made from.
    adapted: Whether there is an adapter.

  Raises:
    ConfigError: A source would be replaced, or something else.
  """
  out = pathlib.Path(out).resolve()
  outs = [out, beside(out)] if to == 'bnb4' and adapted else [out]
  for path in outs:
    _check_apart(path, sources)
  if to == 'gguf':  # its name says what it replaces
    return
  check_replaceable(out, is_adapter_file if to == 'peft' else is_saved)
  if len(outs) > 1:
    check_beside(outs[1])


def _check_apart(out: pathlib.Path, sources: Iterable[pathlib.Path]) -> None:
  for source in (path.resolve() for path in sources):
    for inner, outer, word in (
      (out, source, 'lies in'),
      (source, out, 'would replace'),
    ):
      if inner.is_relative_to(outer):
        word = 'is' if inner == outer else word
        raise ConfigError(
          f'what is written to {out} {word} {source}, which it is made from;'
          ' name another place'
        )


def check_form(
  to: str,
  base: Base,
  spec: LoraSpec | None,
  quant: QuantSpec | None,
  *,
  into: str = 'trained',
  requantize: bool = False,
  kind: str = 'F16',
) -> None:
  """Requires that a form can express a model, as far as sizes say it.

  Args:
    to: As in `check_outputs`.
    base: The base.
    spec: What is trained; None without an adapter.
    quant: How the base is quantized here, presets resolved.
    into: Of merged: what it is merged into.
    requantize: Of bnb4: whether the sum is quantized again.
    kind: Of gguf: what weights are rounded to.

  Raises:
    ConfigError: It cannot.
    AdapterError: PEFT has no form for the adapter.
  """
  if to == 'peft':
    if spec is None:
      raise ConfigError('there is no adapter to write')
    select(spec, base.config)
  elif to == 'gguf':
    plan_gguf(base.config, base.tokenizer, kind)
  elif to == 'merged':
    check_into(into, base)
  elif to == 'bnb4' and (requantize or not base.codes):
    _check_packed(base, spec, quant)


def _check_packed(
  base: Base, spec: LoraSpec | None, quant: QuantSpec | None
) -> None:
  """Requires that there are codes, of a kind that bitsandbytes holds."""
  quantized, quant = {}, agree(quant, base.codes, base.config, spec)
  if quant is not None:
    shapes = layout.shapes(base.config, np.float32)
    split = make_split(shapes, spec, quant)
    quantized = {
      path: quantize_leaf(shapes[path], roles, quant)
      for path, roles in split.quantized.items()
    }
  require_codes(base, quantized)
  choose_packed(base.config, quantized)
