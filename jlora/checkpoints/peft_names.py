"""Which modules of a base PEFT means by the names in an adapter_config.json."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jlora.checkpoints.peft_modules import Modules
from jlora.errors import AdapterError


def saved_modules(fields: Mapping[str, Any], base: Modules) -> frozenset[str]:
  """Returns the modules that an adapter stores whole.

  Args:
    fields: Of adapter_config.json.
    base: Modules of the base.

  Raises:
    AdapterError: A name is no module's, one of two tied modules is missing, or
      a module is stored for some layers only.
  """
  found: set[str] = set()
  for name in _names('modules_to_save', fields['modules_to_save'] or []):
    hits = {
      m
      for m in base.every
      if _ends_in(m, name) or _ends_in(base.owners.get(m, m), name)
    }
    found |= _some(hits, 'modules_to_save', name)
  for stack in base.stacks:
    if found.intersection(stack) and not found.issuperset(stack):
      raise AdapterError(
        f'modules_to_save leaves out {min(set(stack) - found)!r}, but has the'
        ' same module of other layers; this version reads all layers of a'
        ' module or none'
      )
  return _with_twins('modules_to_save', found, fields, base)


def _ends_in(module: str, name: str) -> bool:
  """Whether a module, or one that holds it, has a name that ends in `name`."""
  parts = module.split('.')
  heads = ('.'.join(parts[: i + 1]) for i in range(len(parts)))
  return any(head.endswith(name) for head in heads)


def _with_twins(
  field: str, found: set[str], fields: Mapping[str, Any], base: Modules
) -> frozenset[str]:
  """Returns modules with the tied ones that PEFT adds where it is told to."""
  half = base.shared & found
  if half and fields['ensure_weight_tying']:
    return frozenset(found | base.shared)
  if half and half != base.shared:
    raise AdapterError(
      f'{field} has {min(half)!r} without {min(base.shared - half)!r}, but this'
      ' base has one tensor for both (tie_word_embeddings), of which PEFT would'
      ' change one use only; train it with ensure_weight_tying=True'
    )
  return frozenset(found)


def target_modules(fields: Mapping[str, Any], base: Modules) -> frozenset[str]:
  """Returns the modules with a low-rank pair, by the rules of PEFT.

  Excluded modules and those that are stored whole have none.

  Args:
    fields: Of adapter_config.json.
    base: Modules of the base.

  Raises:
    AdapterError: A name is no module's, a module is neither a linear layer nor
      the embedding, no module is left, or one of two tied modules is missing.
  """
  wanted, excluded = fields['target_modules'], fields['exclude_modules']
  if isinstance(wanted, str):
    found = _by_pattern(fields, base)
  else:
    found = _by_names(
      'target_modules', wanted, base, _layer_filter(fields, base)
    )
  if excluded:
    found -= _excluded(excluded, base)
  for name in fields['modules_to_save'] or []:
    found = {m for m in found if not re.match(rf'(^|.*\.){name}($|\..*)', m)}
  if not found:
    raise AdapterError(
      f'target_modules is {wanted!r:.60}, which leaves no module to adapt'
    )
  other = found - base.linear - {base.embedding, base.head}
  if other:
    raise AdapterError(
      f'target_modules takes in {min(other)!r}, which is neither a linear layer'
      ' nor the embedding; only those are adapted'
    )
  return _with_twins('target_modules', found, fields, base)


def _by_pattern(fields: Mapping[str, Any], base: Modules) -> set[str]:
  pattern, layers = fields['target_modules'], fields['layers_to_transform']
  if layers is not None:
    raise AdapterError(
      f'layers_to_transform is {layers!r:.60} beside the pattern'
      f' {pattern!r:.60}; PEFT takes it with a list of names only'
    )
  if pattern == 'all-linear':
    return set(base.linear - {base.head})
  return {m for m in base.every if re.fullmatch(pattern, m)}


def _excluded(value: Any, base: Modules) -> set[str]:
  if isinstance(value, str):
    return {m for m in base.every if re.fullmatch(value, m)}
  names = _names('exclude_modules', value)
  return {m for m in base.every for n in names if f'.{m}'.endswith(f'.{n}')}


def _by_names(
  field: str, value: Any, base: Modules, keeps: Callable[[str], bool]
) -> set[str]:
  """Returns what a list of names means: modules, or ends of their names.

  Args:
    field: That holds the names.
    value: The names.
    base: Modules of the base.
    keeps: Whether a module that was named by its end alone is meant.
  """
  found: set[str] = set()
  for name in _names(field, value):
    hits = {m for m in base.every if f'.{m}'.endswith(f'.{name}')}
    _some(hits, field, name)
    found |= {m for m in hits if m in value or keeps(m)}
  return found


def _layer_filter(
  fields: Mapping[str, Any], base: Modules
) -> Callable[[str], bool]:
  """Returns whether `layers_to_transform` takes a module in."""
  value, patterns = fields['layers_to_transform'], fields['layers_pattern']
  if value is None or value == []:
    return lambda module: True
  layers = value if isinstance(value, list) else [value]
  if any(type(i) is not int or not 0 <= i < base.layers for i in layers):
    raise AdapterError(
      f'layers_to_transform is {value!r:.60}; this base has the layers 0 to'
      f' {base.layers - 1}'
    )
  patterns = [patterns] if isinstance(patterns, str) else patterns or []
  starts = [rf'(?:^|.*?\.){p}' for p in _names('layers_pattern', patterns)]
  starts = starts or [r'.*?\.[^.]*']

  def keeps(module: str) -> bool:
    hits = (re.match(rf'{start}\.(?P<i>\d+)\.', module) for start in starts)
    hit = next(filter(None, hits), None)
    return hit is not None and int(hit['i']) in layers

  return keeps


def target_parameters(
  fields: Mapping[str, Any], base: Modules
) -> tuple[str, ...]:
  """Returns the parameters with a fused pair, by the rules of PEFT.

  Args:
    fields: Of adapter_config.json.
    base: Modules of the base.

  Raises:
    AdapterError: A name is no parameter of the base.
  """
  names = fields['target_parameters'] or []
  found: dict[str, None] = {}
  for name in names:
    hits = [p for p in base.parameters if f'.{p}'.endswith(f'.{name}')]
    if not hits:
      known = sorted({p.rpartition('.')[2] for p in base.parameters})
      raise AdapterError(
        f'target_parameters has {name!r}, which is no fused parameter of this'
        f' base; it has {known}'
      )
    found |= dict.fromkeys(hits)
  return tuple(found)


def trained_rows(
  fields: Mapping[str, Any], base: Modules
) -> dict[str, tuple[int, ...]]:
  """Returns the row ids of modules of which single rows are trained.

  Args:
    fields: Of adapter_config.json.
    base: Modules of the base.

  Returns:
    Ids in the order of the stored rows. The embedding alone is named where it
    is one tensor with the head.

  Raises:
    AdapterError: A name is no module with a row a token, ids are malformed, or
      tied modules have others.
  """
  value = fields['trainable_token_indices'] or {}
  if not isinstance(value, dict):
    value = {base.embedding: value}
  rows: dict[str, tuple[int, ...]] = {}
  for name, ids in value.items():
    hits = [m for m in (base.embedding, base.head) if m.endswith(name)]
    if len(hits) != 1:
      raise AdapterError(
        f'trainable_token_indices has {name!r}, which is not one of'
        f' {base.embedding!r} and {base.head!r}; only they have a row a token'
      )
    rows[hits[0]] = _row_ids(ids, base)
  if base.head in base.shared & rows.keys():
    _check_tied_rows(rows, base)
    del rows[base.head]
  return rows


def _check_tied_rows(
  rows: Mapping[str, tuple[int, ...]], base: Modules
) -> None:
  ids, tied = rows[base.head], rows.get(base.embedding)
  if ids != tied:
    raise AdapterError(
      f'trainable_token_indices has {ids} for {base.head!r} and {tied} for'
      f' {base.embedding!r}, but this base has one tensor for both'
      ' (tie_word_embeddings); train the same rows of both'
    )


def _row_ids(ids: Any, base: Modules) -> tuple[int, ...]:
  good = isinstance(ids, list) and all(type(i) is int for i in ids)
  if not good or not ids or len(set(ids)) < len(ids):
    raise AdapterError(
      f'trainable_token_indices has {ids!r:.60}; it takes token ids, each once'
    )
  if min(ids) < 0 or max(ids) >= base.vocab_size:
    raise AdapterError(
      f'trainable_token_indices has an id that is not from 0 to'
      f' {base.vocab_size - 1}: they span {min(ids)} to {max(ids)}'
    )
  return tuple(ids)


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
