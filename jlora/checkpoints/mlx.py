"""Adapters as mlx-lm writes them.

`adapters.safetensors` holds, for each module, `lora_a` [in, rank] and `lora_b`
[rank, out], and `m` [out] with DoRA; the update is `scale * lora_a @ lora_b`.
`adapter_config.json` says scale and rank, and how many of the last layers have
an adapter.
"""

import collections
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors

from jlora.checkpoints import adapters
from jlora.checkpoints.adapters import Adapter
from jlora.checkpoints.peft_leaves import Pair, make_layouts
from jlora.checkpoints.peft_modules import Modules, make_modules
from jlora.checkpoints.peft_selection import (
  Selection,
  check_selection,
  spec_of,
)
from jlora.checkpoints.peft_tensors import Shapes, load_tensors
from jlora.core import tree
from jlora.errors import AdapterError
from jlora.models.config import DecoderConfig

TENSORS_FILE = 'adapters.safetensors'

_PARTS = {'a': 'lora_a', 'b': 'lora_b', 'magnitude': 'm'}
_STRENGTH = {'rank', 'scale', 'dropout', 'keys', 'alpha'}  # alpha is not used
_LAYER = re.compile(r'.*?\.(\d+)\.(.*)')


def is_mlx(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder holds an adapter of mlx-lm, and none of PEFT."""
  folder = pathlib.Path(folder)
  names = (TENSORS_FILE, adapters.TENSORS_FILE)
  return [(folder / name).is_file() for name in names] == [True, False]


def load_mlx(folder: str | os.PathLike[str], config: DecoderConfig) -> Adapter:
  """Reads an adapter that mlx-lm wrote for a decoder.

  Args:
    folder: Holds `adapter_config.json` and `adapters.safetensors`.
    config: The decoder's.

  Raises:
    AdapterError: A file is missing or damaged, does not fit the decoder, or
      needs what this version does not compute.
  """
  folder = pathlib.Path(folder).resolve()
  fields, base = _load_fields(folder), make_modules(config)
  path = folder / TENSORS_FILE
  modules = _modules(path)
  _check_modules(path, modules, fields, base)
  rank, scale = fields['rank'], fields['scale']
  selection = Selection(
    pairs=dict.fromkeys(modules, (rank, scale * rank)),
    saved=frozenset(),
    rows={},
    dropout=fields['dropout'],
    scaling='lora',
    variant=fields['type'],
  )
  check_selection(selection, base)
  layouts = make_layouts(selection, config, base)
  tensors = load_tensors(path, _shapes(layouts), {})
  nodes = {
    path: layout.join(
      [
        {part: tensors[f'{module}.{_PARTS[part]}'] for part in layout.shapes}
        for module, rank in zip(
          layout.weight.modules, layout.ranks, strict=True
        )
        if rank
      ]
    )
    for path, layout in layouts.items()
  }
  return Adapter(
    trainable=tree.nest(nodes),
    spec=spec_of(selection, config),
    metadata={},
    base_leaves={},
  )


def _load_fields(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what adapter_config.json says of the arithmetic, checked."""
  path = folder / adapters.CONFIG_FILE
  if not path.is_file():
    raise AdapterError(f'{folder} holds no adapter: {path.name} is missing')
  fields = adapters.load_json(path)
  kind = fields.get('fine_tune_type', 'lora')
  if kind not in ('lora', 'dora'):
    raise AdapterError(
      f"{path}: fine_tune_type is {kind!r}; 'lora' and 'dora' are read. Layers"
      ' that were trained whole are read as a model: write it with mlx_lm.fuse'
    )
  strength = fields.get('lora_parameters')
  if not isinstance(strength, dict):
    raise AdapterError(
      f'{path}: lora_parameters is {strength!r:.60}, no object'
    )
  if others := sorted(strength.keys() - _STRENGTH):
    raise AdapterError(
      f'{path}: lora_parameters has {others[0]}={strength[others[0]]!r:.60},'
      ' which may change what the model computes; known are'
      f' {", ".join(sorted(_STRENGTH))}'
    )
  layers = fields.get('num_layers', fields.get('lora_layers'))
  dropout = strength.get('dropout')
  dropout = 0.0 if dropout is None else dropout
  return {
    'type': kind,
    'keys': _names(path, strength.get('keys')),
    'rank': _number(path, 'rank', strength.get('rank'), int),
    'scale': float(_number(path, 'scale', strength.get('scale'), float)),
    'dropout': float(_number(path, 'dropout', dropout, float, below=1)),
    'layers': _number(path, 'num_layers', layers, int, least=-1),
  }


def _number(
  path: pathlib.Path,
  field: str,
  value: Any,
  kind: type,
  *,
  least: float = 0,
  below: float = 1 << 31,
) -> Any:
  kinds = (int,) if kind is int else (int, float)
  if type(value) not in kinds or not least <= value < below:
    raise AdapterError(
      f'{path}: {field} is {value!r:.60}; it must be a number from {least} to'
      f' below {below}'
    )
  return value


def _names(path: pathlib.Path, keys: Any) -> list[str]:
  """Returns the names of modules in a layer; null stands for those found."""
  if keys is None:
    return []
  if not (isinstance(keys, list) and all(isinstance(x, str) for x in keys)):
    raise AdapterError(
      f'{path}: keys is {keys!r:.60}; it must be a list of names of modules,'
      " such as 'self_attn.q_proj'"
    )
  return keys


def _modules(path: pathlib.Path) -> list[str]:
  """Returns the modules that a file has tensors of."""
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      keys = list(file.keys())
  except (safetensors.SafetensorError, OSError) as error:
    raise AdapterError(
      f'{path} is no whole safetensors file: {error}'
    ) from error
  for key in keys:
    if key.rpartition('.')[2] not in _PARTS.values():
      raise AdapterError(
        f'{path} holds {key!r}, which is no part of a low-rank pair:'
        f' {", ".join(_PARTS.values())}'
      )
  if not keys:
    raise AdapterError(f'{path} holds no tensors')
  return sorted({key.rpartition('.')[0] for key in keys})


def _check_modules(
  path: pathlib.Path,
  modules: Sequence[str],
  fields: Mapping[str, Any],
  base: Modules,
) -> None:
  """Checks that the file has the modules that the config trains."""
  linear = base.linear | {base.embedding}
  if others := sorted(set(modules) - linear):
    raise AdapterError(
      f'{path} holds an adapter of {others[0]!r}, which is no linear layer or'
      ' embedding of this base under the names of Hugging Face'
    )
  if fields['type'] == 'dora' and base.embedding in modules:
    raise AdapterError(
      f'{path}: DoRA of {base.embedding!r} has a magnitude for each token in'
      ' mlx-lm and for each feature here; train without the embedding'
    )
  found = collections.defaultdict(set)
  for module in modules:
    if match := _LAYER.fullmatch(module):
      found[int(match[1])].add(match[2])
  every = set().union(*found.values())
  if keys := fields['keys']:
    inner = {m[2] for m in map(_LAYER.fullmatch, base.linear) if m}
    every |= set(keys) & inner
  count = fields['layers'] if fields['layers'] > 0 else base.layers
  for i in range(base.layers):
    wanted = every if i >= base.layers - count else set()
    if odd := sorted(found[i] ^ wanted):
      raise AdapterError(
        f'{path}: layer {i} {"lacks" if odd[0] in wanted else "has"} an adapter'
        f' of {odd[0]!r}; num_layers={fields["layers"]} and the other layers'
        ' say otherwise'
      )


def _shapes(layouts: Mapping[str, Pair]) -> Shapes:
  """Returns the shapes of all tensors by key."""
  return {
    f'{module}.{_PARTS[part]}': shape[len(layout.weight.stack) :]
    for layout in layouts.values()
    for module, rank in zip(layout.weight.modules, layout.ranks, strict=True)
    if rank
    for part, shape in layout.shapes.items()
  }
