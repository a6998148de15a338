r"""Writes what a run trained in a form that other programs open.

  python -m jlora.export --run=DIR --to=merged --out=PATH

--to=merged  a Hugging Face folder that transformers loads: the base that was
             trained on (4-bit codes decoded) plus the update, summed in
             float32 and written in --dtype. It computes what was trained.
             --into=original adds the update to the base's own weights, which
             is another function.
--to=gguf    the same sum in one GGUF file that llama.cpp loads, with --dtype
             F16, BF16, F32 or Q8_0, and norms in F32. What GGUF cannot say of
             a model or a tokenizer is refused by name.
--to=bnb4    the base in the 4-bit codes that were trained on, as bitsandbytes
             stores them, and the adapter for it in PATH-adapter. A base that is
             stored so already is copied. --requantize merges the adapter and
             quantizes the sum, once --anyway says that this is meant.
--to=peft    an adapter folder that PEFT loads.

Weights are read in float32, whatever device is here. Without --dtype, they are
written in the base's own dtype of 16 bits, or in bfloat16. What a form cannot
hold, or would be written over what it is made from, is refused before that.

Instead of --run: --base=B --adapter=DIR.
"""

import functools
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from jlora import door
from jlora.errors import ConfigError

if TYPE_CHECKING:
  from jlora.checkpoints.bases import Base
  from jlora.core.lora import LoraSpec
  from jlora.core.quantization import QuantSpec
  from jlora.inference.exports import Files
  from jlora.inference.tuned import Tuned

_RUN = flags.DEFINE_string('run', None, 'Run folder.')
_BASE = flags.DEFINE_string('base', None, 'Base model, where there is no run.')
_ADAPTER = flags.DEFINE_string('adapter', None, 'Adapter folder on the base.')
_TO = flags.DEFINE_string('to', None, 'merged, gguf, bnb4 or peft.')
_OUT = flags.DEFINE_string('out', None, 'Folder, or GGUF file, to write.')
_DTYPE = flags.DEFINE_string(
  'dtype',
  None,
  'Of weights: bfloat16, float16 or float32; the default is the one of 16 bits'
  ' that the base has, else bfloat16. Of a GGUF file: F16 (the default), BF16,'
  ' F32 or Q8_0.',
)
_INTO = flags.DEFINE_string(
  'into', 'trained', 'What --to=merged adds to: trained or original weights.'
)
_SHARD = flags.DEFINE_string(
  'max_shard_size', None, 'Largest file of weights: 50GB, or as is named.'
)
_REQUANTIZE = flags.DEFINE_bool(
  'requantize', False, 'With --to=bnb4, quantize the merged weights again.'
)
_ANYWAY = flags.DEFINE_bool(
  'anyway', False, 'With --requantize, write what is left of the adapter.'
)
_ANY_BASE = flags.DEFINE_bool(
  'allow_other_base', False, 'Accept an adapter that another base was part of.'
)
# The first where the base has no dtype of 16 bits itself.
_FLOATS = ('bfloat16', 'float16', 'float32')
_CHOICES = {
  'to': ('merged', 'gguf', 'bnb4', 'peft'),
  'into': ('trained', 'original'),
}
_DTYPES = {
  'merged': _FLOATS,
  'gguf': ('F16', 'BF16', 'F32', 'Q8_0'),
  'bnb4': _FLOATS,
}
_ADVICE = {
  'merged': (
    'use --into=trained, or name the original with --base=ORIGINAL'
    ' --adapter=DIR --allow_other_base'
  ),
  'gguf': 'use --to=merged',
  'bnb4': 'use --to=merged, and quantize with bitsandbytes what that writes',
  'peft': 'use --to=merged',
}
# The same in GGUF's words.
_KINDS = {'bfloat16': 'BF16', 'float16': 'F16', 'float32': 'F32'}


def main() -> None:
  """Checks the flags, then writes."""
  _check_flags()
  dtype, out = _read_dtype(_TO.value), pathlib.Path(_OUT.value)
  if _TO.value == 'gguf':
    from jlora.checkpoints.gguf_writer import check_gguf_path

    check_gguf_path(out)
  from jlora import runs
  from jlora.checkpoints.shard_files import as_bytes
  from jlora.inference.refusals import check_outputs
  from jlora.inference.tuned import load_tuned

  if _SHARD.value is not None:
    as_bytes(_SHARD.value)  # or it refuses, before anything is loaded
  named = runs.find_model(_RUN.value, _BASE.value, _ADAPTER.value)
  adapted = named.adapter is not None and not _REQUANTIZE.value
  check_outputs(_TO.value, out, named.sources, adapted=adapted)
  tuned = load_tuned(
    named.base,
    named.adapter,
    dtype='float32',  # so that no device decides what is written
    allow_other_base=_ANY_BASE.value,
    check=functools.partial(_check_form, dtype),
  )
  for line in _write(tuned, out, dtype):
    print(line)
  print(f'written to {out.absolute()}')


def _check_flags() -> None:
  for name, known in _CHOICES.items():
    if (value := flags.FLAGS[name].value) not in known:
      raise ConfigError(f'--{name} is {value!r}; use {", ".join(known)}')
  if not _OUT.value:
    raise ConfigError('--out is missing; name what to write')
  for name, value, needs in (
    ('--into=original', _INTO.value == 'original', 'merged'),
    ('--requantize', _REQUANTIZE.value, 'bnb4'),
    ('--dtype', _DTYPE.value is not None, 'merged, gguf or bnb4'),
    ('--max_shard_size', _SHARD.value is not None, 'merged or bnb4'),
  ):
    if value and _TO.value not in needs:
      raise ConfigError(f'{name} goes with --to={needs}, not {_TO.value}')
  if _ANYWAY.value and not _REQUANTIZE.value:
    raise ConfigError('--anyway goes with --requantize')


def _read_dtype(to: str) -> str | None:
  """Returns --dtype in a form's own words, or what is usual for the form."""
  if _DTYPE.value is None:
    return _KINDS['float16'] if to == 'gguf' else None
  known = _DTYPES[to]
  words = _KINDS if to == 'gguf' else {}
  dtype = words.get(_DTYPE.value, _DTYPE.value)
  if dtype not in known:
    raise ConfigError(f'--dtype is {_DTYPE.value!r}; use {", ".join(known)}')
  return dtype


def _check_form(
  dtype: str | None,
  base: 'Base',
  spec: 'LoraSpec | None',
  quant: 'QuantSpec | None',
) -> None:
  """Refuses, before weights are read, what a form has no words for."""
  from jlora.inference.refusals import check_form

  try:
    check_form(
      _TO.value,
      base,
      spec,
      quant,
      into=_INTO.value,
      requantize=_REQUANTIZE.value,
      kind=dtype if _TO.value == 'gguf' else '',
    )
  except ConfigError as error:
    raise ConfigError(f'{error}; {_ADVICE[_TO.value]}') from error


def _write(tuned: 'Tuned', out: pathlib.Path, dtype: str | None) -> list[str]:
  """Writes, and returns what there is to say."""
  from jlora.inference import exports, packing

  if _TO.value == 'peft':
    exports.write_peft(tuned, out)
    return []
  if _TO.value == 'gguf':
    holds, distance = exports.write_gguf(tuned, out, dtype)
    return [holds, f'merged into the trained weights: {distance}']
  copied = _TO.value == 'bnb4' and tuned.base.codes and not _REQUANTIZE.value
  said = []
  if dtype is None:
    dtype = tuned.base.half_dtype or _FLOATS[0]
    which = 'of the base' if tuned.base.half_dtype else 'the default'
    said = [] if copied else [f'weights are written in {dtype}, {which}']
  size = {} if _SHARD.value is None else {'max_shard_size': _SHARD.value}
  files = exports.Files(dtype=dtype, **size)
  if _TO.value == 'merged':
    distance = exports.write_merged(tuned, out, files, into=_INTO.value)
    return [*said, f'merged into the {_INTO.value} weights: {distance}']
  write = _requantize if _REQUANTIZE.value else packing.write_packed
  return [*said, *write(tuned, out, files)]


def _requantize(tuned: 'Tuned', out: pathlib.Path, files: 'Files') -> list[str]:
  import numpy as np

  from jlora.inference import packing
  from jlora.inference.requantizing import requantize

  found = requantize(tuned, np.dtype(files.dtype))
  if not _ANYWAY.value:
    raise ConfigError(
      f'{found}; leave --requantize out, which writes codes and adapter apart,'
      ' use --to=merged, or write this with --anyway'
    )
  return packing.write_requantized(tuned, out, files, found)


if __name__ == '__main__':
  door.enter(main)
