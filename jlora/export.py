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

Instead of --run: --base=B --adapter=DIR.
"""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from jlora import door
from jlora.errors import ConfigError

if TYPE_CHECKING:
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
  'Of weights: bfloat16 (the default), float16 or float32. Of a GGUF file: F16'
  ' (the default), BF16, F32 or Q8_0.',
)
_INTO = flags.DEFINE_string(
  'into', 'trained', 'What --to=merged adds to: trained or original weights.'
)
_SHARD = flags.DEFINE_string(
  'max_shard_size', '50GB', 'Largest file of weights, such as 5GB.'
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
_FLOATS = ('bfloat16', 'float16', 'float32')  # the first is the default
_CHOICES = {
  'to': ('merged', 'gguf', 'bnb4', 'peft'),
  'into': ('trained', 'original'),
}
_DTYPES = {
  'merged': _FLOATS,
  'gguf': ('F16', 'BF16', 'F32', 'Q8_0'),
  'bnb4': _FLOATS,
  'peft': _FLOATS,
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

  as_bytes(_SHARD.value)  # or it refuses, before anything is loaded
  tuned = runs.open_model(
    _RUN.value,
    _BASE.value,
    _ADAPTER.value,
    allow_other_base=_ANY_BASE.value,
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
  ):
    if value and _TO.value != needs:
      raise ConfigError(f'{name} goes with --to={needs}, not {_TO.value}')
  if _ANYWAY.value and not _REQUANTIZE.value:
    raise ConfigError('--anyway goes with --requantize')


def _read_dtype(to: str) -> str:
  """Returns --dtype, or what is usual for a form."""
  known = _DTYPES[to]
  if _DTYPE.value is None:
    return known[0]
  words = _KINDS if to == 'gguf' else {}
  dtype = words.get(_DTYPE.value, _DTYPE.value)
  if dtype not in known:
    raise ConfigError(f'--dtype is {_DTYPE.value!r}; use {", ".join(known)}')
  return dtype


def _write(tuned: 'Tuned', out: pathlib.Path, dtype: str) -> list[str]:
  """Writes, and returns what there is to say."""
  from jlora.inference import exports, packing

  files = exports.Files(dtype=dtype, max_shard_size=_SHARD.value)
  if _TO.value == 'peft':
    exports.write_peft(tuned, out)
    return []
  if _TO.value == 'gguf':
    return [exports.write_gguf(tuned, out, dtype)]
  if _TO.value == 'merged':
    distance = exports.write_merged(tuned, out, files, into=_INTO.value)
    return [f'merged into the {_INTO.value} weights: {distance}']
  if not _REQUANTIZE.value:
    return packing.write_packed(tuned, out, files)
  return _requantize(tuned, out, files)


def _requantize(tuned: 'Tuned', out: pathlib.Path, files: 'Files') -> list[str]:
  import numpy as np

  from jlora.inference import packing
  from jlora.inference.requantizing import requantize

  packing.codes_of(tuned)  # or it refuses
  found = requantize(tuned, np.dtype(files.dtype))
  if not _ANYWAY.value:
    raise ConfigError(
      f'{found}; leave --requantize out, which writes codes and adapter apart,'
      ' use --to=merged, or write this with --anyway'
    )
  return packing.write_requantized(tuned, out, files, found)


if __name__ == '__main__':
  door.enter(main)
