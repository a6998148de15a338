"""PEFT's adapter_config.json: what is written, understood and refused."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jlora.checkpoints import adapters
from jlora.checkpoints.peft_fused import Fused
from jlora.checkpoints.peft_modules import (
  Modules,
  shorten,
  shorten_parameters,
)
from jlora.checkpoints.peft_names import (
  saved_modules,
  target_modules,
  target_parameters,
  trained_rows,
)
from jlora.checkpoints.peft_scales import Strength
from jlora.checkpoints.peft_selection import Selection, check_selection
from jlora.errors import AdapterError

# The version of PEFT whose fields are written.
SCHEMA_VERSION = '0.21.2'

# Fields that change what a model computes, at the value that does not.
_ARITHMETIC = {
  'alora_invocation_tokens': None,
  'arrow_config': None,
  'bias': 'none',
  'kasa_config': None,
  'layer_replication': None,
  'lora_bias': False,
  'megatron_config': None,
  'monteclora_config': None,
  'use_bdlora': None,
  'use_qalora': False,
  'velora_config': None,
}

# Fields that say which modules are meant, how strongly, and of what rank.
_SELECTION = {
  'alpha_pattern': {},
  'ensure_weight_tying': False,
  'exclude_modules': None,
  'layers_pattern': None,
  'layers_to_transform': None,
  'lora_alpha': 8,
  'lora_dropout': 0.0,
  'modules_to_save': None,
  'r': 8,
  'rank_pattern': {},
  'target_modules': None,
  'target_parameters': None,
  'trainable_token_indices': None,
  'use_dora': False,
  'use_rslora': False,
}

# Fields without influence on what a trained adapter computes.
_NOTES = {
  'auto_mapping': None,
  'base_model_name_or_path': None,
  'corda_config': None,
  'eva_config': None,
  # PEFT sets it itself, by the kind of each module, and warns.
  'fan_in_fan_out': False,
  'inference_mode': True,
  'init_lora_weights': True,
  'loftq_config': {},
  'lora_ga_config': None,
  'megatron_core': 'megatron.core',
  'peft_type': 'LORA',
  'peft_version': SCHEMA_VERSION,
  'qalora_group_size': 16,
  'revision': None,
  'task_type': 'CAUSAL_LM',
}

# The others change the base, which the files do not hold.
_INITS_THAT_KEEP_THE_BASE = (True, False, 'gaussian', 'eva', 'orthogonal')


def make_fields(
  selection: Selection,
  base: Modules,
  base_name: str,
  fused: Mapping[str, Fused],
) -> dict[str, Any]:
  """Returns every field of PEFT's LoraConfig.

  Where pairs are fused `lora_dropout` is 0: PEFT opens no others.

  Args:
    selection: What the adapter holds.
    base: Modules of the base.
    base_name: Name of the base, as its user would load it.
    fused: Pairs of parameters, which hold those of modules.
  """
  modules = selection.pairs.keys() - base.owners.keys()
  pairs = {m: selection.pairs[m] for m in sorted(modules)}
  pairs |= {p: (f.rank, f.alpha) for p, f in sorted(fused.items())}
  rank, alpha = dataclasses.replace(selection, pairs=pairs).usual
  names = {f'^{m}': (m,) for m in modules} | shorten_parameters(fused, base)
  tied = base.shared & {*selection.pairs, *selection.saved}
  return {
    **_ARITHMETIC,
    **_SELECTION,
    **_NOTES,
    'alpha_pattern': _patterns(
      names, {name: _short(a) for name, (_, a) in pairs.items()}, alpha
    ),
    'base_model_name_or_path': base_name,
    'ensure_weight_tying': bool(tied),
    'fan_in_fan_out': base.plain,
    'lora_alpha': _short(alpha),
    'lora_dropout': 0.0 if fused else selection.dropout,
    'modules_to_save': shorten(selection.saved, base) or None,
    'r': rank,
    'rank_pattern': _patterns(
      names, {name: r for name, (r, _) in pairs.items()}, rank
    ),
    'target_modules': shorten(frozenset(modules), base),
    'target_parameters': sorted(shorten_parameters(fused, base)) or None,
    'trainable_token_indices': _row_fields(selection.rows, base),
    'use_dora': selection.variant == 'dora',
    'use_rslora': selection.scaling == 'rslora',
  }


def _patterns(
  names: Mapping[str, tuple[str, ...]], values: Mapping[str, Any], usual: Any
) -> dict[str, Any]:
  """Returns pattern and value wherever the value is not the usual one.

  Args:
    names: What each name means, as a pattern.
    values: By module or parameter.
    usual: What holds where no pattern matches.
  """
  found = {}
  for name, meant in names.items():
    if len({values[x] for x in meant}) == 1:
      found[name] = values[meant[0]]
    else:
      found |= {f'^{x}': values[x] for x in meant}
  return {name: value for name, value in found.items() if value != usual}


def _short(alpha: float) -> float:
  return int(alpha) if alpha == int(alpha) else alpha


def _row_fields(
  rows: Mapping[str, tuple[int, ...]], base: Modules
) -> dict[str, list[int]] | list[int] | None:
  if rows.keys() == {base.embedding}:
    return list(rows[base.embedding])
  return {module: list(ids) for module, ids in sorted(rows.items())} or None


def load_selection(path: pathlib.Path, base: Modules) -> Selection:
  """Reads an adapter_config.json as PEFT does, and refuses what it cannot say.

  Args:
    path: The file.
    base: Modules of the base.

  Raises:
    AdapterError: A field changes the arithmetic in a way that this version
      does not compute, names no module, or is malformed.
  """
  fields = {**_ARITHMETIC, **_SELECTION, **adapters.load_json(path)}
  try:
    _check_kind(fields)
    saved = saved_modules(fields, base)
    selection = Selection(
      pairs={**_module_pairs(fields, base), **_parameter_pairs(fields, base)},
      saved=saved,
      rows=trained_rows(fields, base),
      dropout=_number('lora_dropout', fields['lora_dropout']),
      scaling='rslora' if fields['use_rslora'] else 'lora',
      variant='dora' if fields['use_dora'] else 'lora',
    )
    check_selection(selection, base)
  except AdapterError as error:
    raise AdapterError(f'{path}: {error}') from error
  except re.error as error:
    raise AdapterError(
      f'{path}: {error.pattern!r} is no regular expression: {error}'
    ) from error
  return selection


def load_parameters(path: pathlib.Path, base: Modules) -> dict[str, Strength]:
  """Returns the parameters with fused pairs, their rank and their alpha.

  Args:
    path: The file; `load_selection` has read it.
    base: Modules of the base.
  """
  fields = {**_SELECTION, **adapters.load_json(path)}
  return {p: _strength(fields, p) for p in target_parameters(fields, base)}


Pairs = dict[str, Strength]


def _module_pairs(fields: dict[str, Any], base: Modules) -> Pairs:
  """Returns rank and alpha of the modules with a pair of their own."""
  if fields['target_parameters'] and not fields['target_modules']:
    return {}
  return {m: _strength(fields, m) for m in target_modules(fields, base)}


def _parameter_pairs(fields: dict[str, Any], base: Modules) -> Pairs:
  """Returns rank and alpha of the modules whose pairs are fused."""
  return {
    module: _strength(fields, parameter)
    for parameter in target_parameters(fields, base)
    for modules in base.parameters[parameter]
    for module in modules
  }


def _check_kind(fields: dict[str, Any]) -> None:
  if fields.get('peft_type') != 'LORA':
    raise AdapterError(
      f"peft_type is {fields.get('peft_type')!r}; only 'LORA' can be read"
    )
  for name, neutral in _ARITHMETIC.items():
    if fields[name] and fields[name] != neutral:
      raise AdapterError(
        f'{name} is {fields[name]!r:.60}, which changes what the model computes'
        f' in a way that this version does not know; it must be {neutral!r}'
      )
  known = {**_ARITHMETIC, **_SELECTION, **_NOTES}
  for name in sorted(fields.keys() - known.keys()):
    if fields[name]:
      raise AdapterError(
        f'{name} is {fields[name]!r:.60}, a field that PEFT {SCHEMA_VERSION}'
        ' does not have; it may change what the model computes'
      )
  init = fields.get('init_lora_weights', True)
  if init not in _INITS_THAT_KEEP_THE_BASE:
    raise AdapterError(
      f'init_lora_weights is {init!r:.60}, which changes the base; save the'
      ' adapter again in PEFT with path_initial_model_for_weight_conversion,'
      ' which makes it plain LoRA'
    )


def _strength(fields: dict[str, Any], module: str) -> Strength:
  """Returns the rank and the alpha of one module."""
  return (
    _for_module('rank_pattern', 'r', fields, module),
    _for_module('alpha_pattern', 'lora_alpha', fields, module),
  )


def _for_module(
  patterns: str, default: str, fields: dict[str, Any], module: str
) -> Any:
  """Returns what the first pattern that matches says, in the file's order."""
  value = fields[default]
  if not isinstance(fields[patterns] or {}, dict):
    raise AdapterError(f'{patterns} is {fields[patterns]!r:.60}, no object')
  for pattern, entry in (fields[patterns] or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      value = entry
      break
  return _number(default, value)


def _number(field: str, value: Any) -> Any:
  """Returns a rank, alpha or dropout if it can be one."""
  kinds = int if field == 'r' else (int, float)
  good = isinstance(value, kinds) and not isinstance(value, bool)
  if field == 'r':
    good, bounds = good and 1 <= value <= 1 << 20, 'a whole number from 1'
  elif field == 'lora_alpha':
    good, bounds = good and 0 < value <= 1 << 30, 'above 0 and finite'
  else:
    good, bounds = good and 0 <= value < 1, 'in [0, 1)'
  if not good:
    raise AdapterError(f'{field} is {value!r:.60}; it must be {bounds}')
  return value if field == 'r' else float(value)
