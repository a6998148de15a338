r"""Writes what a run trained in a form that other programs open.

  python -m jlora.export --run=DIR --to=merged --out=PATH

--to=merged  a Hugging Face folder that transformers loads: the base that was
             trained on (4-bit codes decoded) plus the update, summed in
             float32 and written in --dtype. It computes what was trained.
--to=peft    an adapter folder that PEFT loads.

Instead of --run: --base=B --adapter=DIR.
"""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from jlora import door
from jlora.errors import ConfigError

if TYPE_CHECKING:
  from jlora.inference.tuned import Tuned

_RUN = flags.DEFINE_string('run', None, 'Run folder.')
_BASE = flags.DEFINE_string('base', None, 'Base model, where there is no run.')
_ADAPTER = flags.DEFINE_string('adapter', None, 'Adapter folder on the base.')
_TO = flags.DEFINE_string('to', None, 'merged or peft.')
_OUT = flags.DEFINE_string('out', None, 'Folder to write.')
_DTYPE = flags.DEFINE_string(
  'dtype', 'bfloat16', 'Of a merged model: bfloat16, float16 or float32.'
)
_DTYPES = ('bfloat16', 'float16', 'float32')
_ANY_BASE = flags.DEFINE_bool(
  'allow_other_base', False, 'Accept an adapter that another base was part of.'
)


def main() -> None:
  """Checks the flags, then writes."""
  if _TO.value not in ('merged', 'peft'):
    raise ConfigError(f'--to is {_TO.value!r}; use merged or peft')
  if not _OUT.value:
    raise ConfigError('--out is missing; name the folder to write')
  if _DTYPE.value not in _DTYPES:
    raise ConfigError(f'--dtype is {_DTYPE.value!r}; use {", ".join(_DTYPES)}')
  from jlora import runs

  tuned = runs.open_model(
    _RUN.value,
    _BASE.value,
    _ADAPTER.value,
    allow_other_base=_ANY_BASE.value,
  )
  out = pathlib.Path(_OUT.value)
  if _TO.value == 'merged':
    _write_merged(tuned, out)
  else:
    _write_peft(tuned, out)
  print(f'written to {out.absolute()}')


def _write_merged(tuned: 'Tuned', out: pathlib.Path) -> None:
  from jlora.checkpoints.hf import save_folder

  save_folder(
    out,
    tuned.base.config,
    tuned.dense('float32'),
    tuned.base.tokenizer,
    _DTYPE.value,
    eos_token_ids=tuned.base.eos_token_ids,
  )


def _write_peft(tuned: 'Tuned', out: pathlib.Path) -> None:
  from jlora.checkpoints.peft import save_adapter

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


if __name__ == '__main__':
  door.enter(main)
