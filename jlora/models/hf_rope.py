"""Rotary embeddings in config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jlora.errors import BaseModelError
from jlora.models import rope_scaling
from jlora.models.config import DecoderConfig
from jlora.models.family import Family
from jlora.models.hf_layers import WHOLE, WINDOW
from jlora.models.rope_scaling import RopeScaling

FIELDS = {'rope_parameters', 'rope_scaling', 'rope_theta'}
LOCAL_FIELDS = {'rope_local_base_freq'}
_LONGEST = 'original_max_position_embeddings'
# Field of a stretch -> field of config.json, where the names differ.
_NAMES = {'original_max_positions': _LONGEST}
_OLD_KINDS = {'su': 'longrope'}
_SHARE = 'partial_rotary_factor'

Fields = Mapping[str, Any]


def read_rope(
  family: Family, fields: Fields, max_positions: int
) -> dict[str, Any]:
  """Returns the fields of DecoderConfig about rotary embeddings.

  Args:
    family: The model's.
    fields: Of config.json.
    max_positions: Longest sequence that the base was trained for.

  Raises:
    BaseModelError: They are stretched in a way that is not known, or a number
      is missing or none.
  """
  if family.traits.get('learned_positions'):
    return {}
  rope = fields.get('rope_parameters') or fields.get('rope_scaling') or {}
  found: dict[str, Any] = {}
  if family.local_theta is not None:
    rope, local = _split(rope)
    theta = fields.get('rope_local_base_freq', family.local_theta)
    found['local_rope_theta'] = float(local.get('rope_theta', theta))
  if _LONGEST in fields:  # Phi-3's comes before that of the stretch
    rope = {**rope, _LONGEST: fields[_LONGEST]} if rope else rope
  share = rope.get(_SHARE, fields.get(_SHARE, 1.0))
  if share != 1 and 'rotary_share' not in family.fields:
    raise BaseModelError(
      f'config.json has {_SHARE}={share!r} in its rope parameters, which'
      f' {family.architecture} does not compute with'
    )
  theta = rope.get('rope_theta', fields.get('rope_theta', 10000.0))
  width = fields['hidden_size'] // fields['num_attention_heads']
  pairs = int((fields.get('head_dim') or width) * share) // 2
  return {
    **found,
    'rope_theta': float(theta),
    'rope_scaling': _read_scaling(rope, max_positions, pairs),
    'rotary_share': float(share),
  }


def _split(rope: Fields) -> tuple[Fields, Fields]:
  """Returns the parameters of layers that see everything, and of the others."""
  if not rope.keys() & {WHOLE, WINDOW}:
    return rope, {}
  local = rope.get(WINDOW) or {}
  kind = local.get('rope_type', 'default')
  if kind != 'default':
    raise BaseModelError(
      f'config.json has rope_type={kind!r} for {WINDOW}, where this decoder'
      " computes 'default' only"
    )
  return rope.get(WHOLE) or {}, local


def _read_scaling(
  rope: Fields, max_positions: int, pairs: int
) -> RopeScaling | None:
  kind = rope.get('rope_type', rope.get('type', 'default'))
  kind = _OLD_KINDS.get(kind, kind)
  if kind == 'default':
    return None
  if kind not in rope_scaling.KINDS:
    known = ', '.join(map(repr, ['default', *rope_scaling.KINDS]))
    raise BaseModelError(
      f'rope_type {kind!r} is not supported; jlora knows {known}'
    )
  make = rope_scaling.KINDS[kind]
  rope = {_LONGEST: max_positions, **rope}  # as in transformers
  _refuse_others(rope, make)
  values = {}
  for field in dataclasses.fields(make):
    if field.name == 'max_positions':
      values[field.name] = max_positions
      continue
    key = _NAMES.get(field.name, field.name)
    # Llama 3's have no default in transformers; the others' are ours too.
    needed = field.default is dataclasses.MISSING or kind == 'llama3'
    if needed or rope.get(key) is not None:
      listed = field.name in rope_scaling.LISTS
      values[field.name] = _number(key, rope[key], pairs if listed else None)
  return make(**values)


def _refuse_others(rope: Fields, make: Any) -> None:
  """Refuses parameters that a stretch does not compute with."""
  names = {_NAMES.get(f.name, f.name) for f in dataclasses.fields(make)}
  known = names | {'rope_type', 'type', 'rope_theta', _SHARE, _LONGEST}
  for name in rope.keys() - known:
    if rope[name]:
      raise BaseModelError(
        f'config.json has {name}={rope[name]!r:.80} in its rope parameters,'
        f' which rope_type {make.KIND!r} does not have'
      )


def _number(key: str, value: Any, count: int | None) -> Any:
  """Returns a number, or a tuple of `count` of them."""
  numbers = [value] if count is None else value
  if (
    not isinstance(numbers, list | tuple)
    or len(numbers) != (count or 1)
    or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
  ):
    kind = 'a number' if count is None else f'a list of {count} numbers'
    raise BaseModelError(
      f'config.json has {key}={value!r:.80} in its rope parameters, which'
      f' must be {kind}'
    )
  return value if count is None else tuple(map(float, value))


def write_rope(family: Family, config: DecoderConfig) -> dict[str, Any]:
  """Returns the fields of config.json that say what `read_rope` reads."""
  if config.learned_positions:
    return {}
  scaling = config.rope_scaling
  kind = 'default' if scaling is None else scaling.KIND
  rope = {'rope_type': kind, 'rope_theta': config.rope_theta}
  for name, value in dataclasses.asdict(scaling).items() if scaling else ():
    if name != 'max_positions' and value is not None:
      key = _NAMES.get(name, name)
      rope[key] = list(value) if isinstance(value, tuple) else value
  if 'rotary_share' in family.fields:
    rope[_SHARE] = config.rotary_share
  if family.local_theta is None:
    return {'rope_parameters': rope, **_outside(family, rope)}
  local = {'rope_type': 'default', 'rope_theta': config.local_rope_theta}
  return {'rope_parameters': {WHOLE: rope, WINDOW: local}}


def _outside(family: Family, rope: Fields) -> Fields:
  """Returns what stands beside the rope parameters, and counts more there."""
  names = family.defaults.keys() & {_LONGEST}
  return {name: rope[name] for name in names & rope.keys()}
