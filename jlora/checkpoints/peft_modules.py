"""Which modules of a base PEFT means by the names in an adapter_config.json."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jlora.errors import AdapterError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modules:
  """The modules of a base that have a weight, as PEFT sees them.

  Attributes:
    every: Names of all of them.
    linear: Those that can take a low-rank pair.
    head: The one that makes logits.
    shared: Those that are one tensor: embedding and head, or none.
    layers: Number of decoder layers.
  """

  every: frozenset[str]
  linear: frozenset[str]
  head: str
  shared: frozenset[str]
  layers: int


def shorten(chosen: frozenset[str], base: Modules) -> list[str]:
  """Names modules by their last part where that means no others to PEFT.

  PEFT compares the ends of names: 'norm' would mean 'input_layernorm' too.

  Args:
    chosen: Modules.
    base: The base that they are part of.
  """
  names = set()
  for module in chosen:
    last = module.rpartition('.')[2]
    meant = {m for m in base.every if m.endswith(last)}
    names.add(last if meant <= chosen else module)
  return sorted(names)


def saved_modules(fields: Mapping[str, Any], base: Modules) -> frozenset[str]:
  """Returns the modules that an adapter stores whole.

  Args:
    fields: Of adapter_config.json.
    base: Modules of the base.

  Raises:
    AdapterError: A name is no module's, or one of two tied modules is missing.
  """
  found: set[str] = set()
  for name in _names('modules_to_save', fields['modules_to_save'] or []):
    hits = {m for m in base.every if _ends_in(m, name)}
    found |= _some(hits, 'modules_to_save', name)
  if fields['ensure_weight_tying'] and found & base.shared:
    found |= base.shared
  if base.shared & found and not base.shared <= found:
    raise AdapterError(
      f'modules_to_save has {min(base.shared & found)!r} without'
      f' {min(base.shared - found)!r}, but this base has one tensor for both'
      ' (tie_word_embeddings)'
    )
  return frozenset(found)


def _ends_in(module: str, name: str) -> bool:
  """Whether a module, or one that holds it, has a name that ends in `name`."""
  parts = module.split('.')
  heads = ('.'.join(parts[: i + 1]) for i in range(len(parts)))
  return any(head.endswith(name) for head in heads)


def target_modules(fields: Mapping[str, Any], base: Modules) -> frozenset[str]:
  """Returns the modules with a low-rank pair, by the rules of PEFT.

  Excluded modules and those that are stored whole have none.

  Args:
    fields: Of adapter_config.json.
    base: Modules of the base.

  Raises:
    AdapterError: A name is no module's, a module is no linear layer, no module
      is left, or only some of the layers are adapted.
  """
  wanted, excluded = fields['target_modules'], fields['exclude_modules']
  if wanted == 'all-linear':
    found = set(base.linear - {base.head})
  else:
    found = _matching('target_modules', wanted, base)
  if excluded:
    found -= _matching('exclude_modules', excluded, base, strict=False)
  for name in fields['modules_to_save'] or []:
    found = {m for m in found if not re.match(rf'(^|.*\.){name}($|\..*)', m)}
  if not found:
    raise AdapterError(
      f'target_modules is {wanted!r:.60}, which leaves no module to adapt'
    )
  if found - base.linear:
    raise AdapterError(
      f'target_modules takes in {min(found - base.linear)!r}, which is no'
      ' linear layer of its own in this base; only those are adapted'
    )
  _check_layers(fields['layers_to_transform'], base.layers)
  return frozenset(found)


def _matching(
  field: str, value: Any, base: Modules, *, strict: bool = True
) -> set[str]:
  """Returns what a pattern, or a list of names, means to PEFT."""
  if isinstance(value, str):
    return {m for m in base.every if re.fullmatch(value, m)}
  found: set[str] = set()
  for name in _names(field, value):
    hits = {m for m in base.every if f'.{m}'.endswith(f'.{name}')}
    found |= _some(hits, field, name) if strict else hits
  return found


def _names(field: str, value: Any) -> list[str]:
  if isinstance(value, list) and all(isinstance(name, str) for name in value):
    return value
  raise AdapterError(f'{field} is {value!r:.60}; it must be a list of names')


def _some(hits: set[str], field: str, name: str) -> set[str]:
  if not hits:
    raise AdapterError(
      f'{field} has {name!r}, which is no module of this base; take it out if'
      ' it was meant for another model'
    )
  return hits


def _check_layers(value: Any, layers: int) -> None:
  if value is None or value == []:
    return
  if value != list(range(layers)) and not (value == 0 and layers == 1):
    raise AdapterError(
      f'layers_to_transform is {value!r:.60}; layers are adapted alike in this'
      f' version: all {layers} or none'
    )
