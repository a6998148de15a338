r"""Writes what a run trained in a form that other programs open.

  python -m jlora.export --run=DIR --to=merged --out=PATH

--to=merged  a Hugging Face folder that transformers loads: the base that was
             trained on (4-bit codes decoded) plus the update, summed in
             float32 and written in --dtype. It computes what was trained.
--to=gguf    the same sum in one GGUF file that llama.cpp loads, with --dtype
             F16, BF16, F32 or Q8_0, and norms in F32. What GGUF cannot say of
             a model or a tokenizer is refused by name.
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
_TO = flags.DEFINE_string('to', None, 'merged, gguf or peft.')
_OUT = flags.DEFINE_string('out', None, 'Folder, or GGUF file, to write.')
_DTYPE = flags.DEFINE_string(
  'dtype',
  None,
  'Of a merged model: bfloat16 (the default), float16 or float32. Of a GGUF'
  ' file: F16 (the default), BF16, F32 or Q8_0.',
)
_DTYPES = {  # the first is the default
  'merged': ('bfloat16', 'float16', 'float32'),
  'gguf': ('F16', 'BF16', 'F32', 'Q8_0'),
  'peft': (None,),
}
# The same in GGUF's words.
_KINDS = {'bfloat16': 'BF16', 'float16': 'F16', 'float32': 'F32'}
_ANY_BASE = flags.DEFINE_bool(
  'allow_other_base', False, 'Accept an adapter that another base was part of.'
)


def main() -> None:
  """Checks the flags, then writes."""
  if _TO.value not in _DTYPES:
    raise ConfigError(f'--to is {_TO.value!r}; use merged, gguf or peft')
  if not _OUT.value:
    raise ConfigError('--out is missing; name what to write')
  dtype, out = _read_dtype(_TO.value), pathlib.Path(_OUT.value)
  if _TO.value == 'gguf':
    from jlora.checkpoints.gguf_writer import check_gguf_path

    check_gguf_path(out)
  from jlora import runs

  tuned = runs.open_model(
    _RUN.value,
    _BASE.value,
    _ADAPTER.value,
    allow_other_base=_ANY_BASE.value,
  )
  if _TO.value == 'merged':
    _write_merged(tuned, out, dtype)
  elif _TO.value == 'gguf':
    _write_gguf(tuned, out, dtype)
  else:
    _write_peft(tuned, out)
  print(f'written to {out.absolute()}')


def _read_dtype(to: str) -> str | None:
  """Returns --dtype, or what is usual for a form."""
  known = _DTYPES[to]
  if _DTYPE.value is None or to == 'peft':
    return known[0]
  words = _KINDS if to == 'gguf' else {}
  dtype = words.get(_DTYPE.value, _DTYPE.value)
  if dtype not in known:
    raise ConfigError(f'--dtype is {_DTYPE.value!r}; use {", ".join(known)}')
  return dtype


def _write_merged(tuned: 'Tuned', out: pathlib.Path, dtype: str) -> None:
  from jlora.checkpoints.hf import save_folder

  save_folder(
    out,
    tuned.base.config,
    tuned.dense('float32'),
    tuned.base.tokenizer,
    dtype,
    eos_token_ids=tuned.base.eos_token_ids,
  )


def _write_gguf(tuned: 'Tuned', out: pathlib.Path, kind: str) -> None:
  from jlora.checkpoints.gguf_writer import plan_gguf, save_gguf

  plan = plan_gguf(
    tuned.base.config,
    tuned.base.tokenizer,
    kind,
    eos_token_ids=tuned.base.eos_token_ids,
    title=out.stem,
  )
  print(plan.describe())
  save_gguf(out, plan, tuned.dense('float32'))


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
