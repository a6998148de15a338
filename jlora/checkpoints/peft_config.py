"""PEFT's adapter_config.json: what is written, understood and refused."""

import dataclasses
import math
import pathlib
import re
from typing import Any

from jlora.checkpoints import adapters
from jlora.checkpoints.peft_modules import (
  Modules,
  saved_modules,
  shorten,
  target_modules,
)
from jlora.errors import AdapterError

# The version of PEFT whose fields are written.
SCHEMA_VERSION = '0.21.2'

# Fields that change what a model computes, at the value that does not.
_ARITHMETIC = {
  'alora_invocation_tokens': None,
  'arrow_config': None,
  'bias': 'none',
  'fan_in_fan_out': False,
  'kasa_config': None,
  'layer_replication': None,
  'lora_bias': False,
  'megatron_config': None,
  'monteclora_config': None,
  'target_parameters': None,
  'trainable_token_indices': None,
  'use_bdlora': None,
  'use_dora': False,
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
  'use_rslora': False,
}

# Fields without influence on what a trained adapter computes.
_NOTES = {
  'auto_mapping': None,
  'base_model_name_or_path': None,
  'corda_config': None,
  'eva_config': None,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """What an adapter_config.json means for one base.

  Attributes:
    rank: Of every low-rank pair.
    alpha: Such that an update is `(alpha / rank) * B @ A`.
    dropout: What the adapter was trained with.
    targets: Modules with a low-rank pair.
    saved: Modules that are stored whole.
  """

  rank: int
  alpha: float
  dropout: float
  targets: frozenset[str]
  saved: frozenset[str]


def make_fields(
  selection: Selection, base: Modules, base_name: str
) -> dict[str, Any]:
  """Returns every field of PEFT's LoraConfig.

  Args:
    selection: What the adapter holds.
    base: Modules of the base.
    base_name: Name of the base, as its user would load it.
  """
  alpha = selection.alpha
  return {
    **_ARITHMETIC,
    **_SELECTION,
    **_NOTES,
    'base_model_name_or_path': base_name,
    'ensure_weight_tying': bool(selection.saved & base.shared),
    'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
    'lora_dropout': selection.dropout,
    'modules_to_save': shorten(selection.saved, base) or None,
    'r': selection.rank,
    'target_modules': shorten(selection.targets, base),
  }


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
    targets = target_modules(fields, base)
    rank, alpha = _strength(fields, targets)
    dropout = _number('lora_dropout', fields['lora_dropout'])
  except AdapterError as error:
    raise AdapterError(f'{path}: {error}') from error
  except re.error as error:
    raise AdapterError(
      f'{path}: {error.pattern!r} is no regular expression: {error}'
    ) from error
  return Selection(
    rank=rank, alpha=alpha, dropout=dropout, targets=targets, saved=saved
  )


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


def _strength(
  fields: dict[str, Any], targets: frozenset[str]
) -> tuple[int, float]:
  """Returns the rank and alpha that all targets have in common."""
  found: dict[tuple[Any, Any], str] = {}
  for module in sorted(targets):
    rank = _for_module('rank_pattern', 'r', fields, module)
    alpha = _for_module('alpha_pattern', 'lora_alpha', fields, module)
    found.setdefault((rank, alpha), module)
  if len(found) > 1:
    (first, one), (second, other) = list(found.items())[:2]
    raise AdapterError(
      f'{one} has rank and alpha {first}, but {other} has {second}; in this'
      ' version they are the same for all modules'
    )
  ((rank, alpha),) = found
  return rank, alpha * math.sqrt(rank) if fields['use_rslora'] else alpha


def _for_module(
  patterns: str, default: str, fields: dict[str, Any], module: str
) -> Any:
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
