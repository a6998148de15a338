"""The only reader of ConfigDicts: defaults, types and checks across fields."""

import ast
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from jlora.checkpoints.bases import DEFAULT_BASE, check_base
from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec
from jlora.data.rows import columns_of
from jlora.data.sources import check_source, held_out_source, is_task
from jlora.errors import ConfigError
from jlora.training.optimizers import OptimSpec
from jlora.training.run_spec import (
  DataSpec,
  EvalSpec,
  LogSpec,
  MeshSpec,
  RunSpec,
  TrainSpec,
)

_SECTIONS = {
  'quant': QuantSpec,
  'lora': LoraSpec,
  'data': DataSpec,
  'train': TrainSpec,
  'optim': OptimSpec,
  'eval': EvalSpec,
  'mesh': MeshSpec,
  'log': LogSpec,
}
_TOP = [*_SECTIONS, 'base', 'seed']
_BRACKETS = ('(', '[', '{')


def default_config() -> ml_collections.ConfigDict:
  """Returns a config with every field; an experiment changes what differs.

  `quant` is None, which trains plain LoRA; `default_quant` fills it.
  """
  config = ml_collections.ConfigDict({'base': DEFAULT_BASE, 'seed': 0})
  for name, section in _SECTIONS.items():
    config[name] = None if name == 'quant' else _defaults(section)
  return config.lock()


def default_quant() -> ml_collections.ConfigDict:
  """Returns the `quant` section of QLoRA: NF4 with double quantization."""
  return _defaults(QuantSpec)


def _defaults(section: Any) -> ml_collections.ConfigDict:
  """Returns a section with the defaults of its dataclass."""
  hints = typing.get_type_hints(section)
  fields: dict[str, Any] = {}
  for field in dataclasses.fields(section):
    kind, default = _plain(hints[field.name]), field.default
    if default is dataclasses.MISSING and hints[field.name] is not kind:
      fields[field.name] = config_dict.placeholder(object)
    elif default in (None, dataclasses.MISSING):
      fields[field.name] = config_dict.placeholder(kind)
    elif isinstance(default, str | tuple) and hints[field.name] is not str:
      # One pattern or several: a ConfigDict would hold on to the first type.
      fields[field.name] = config_dict.FieldReference(default, object)
    else:
      fields[field.name] = default
  return ml_collections.ConfigDict(fields)


def _plain(hint: Any) -> Any:
  """Returns the type that a field has where it is not None."""
  if isinstance(hint, types.UnionType):
    return next(t for t in hint.__args__ if t is not types.NoneType)
  return str if hint is Any else hint


def resolve(config: Mapping[str, Any]) -> RunSpec:
  """Returns the run that a config describes.

  Args:
    config: A ConfigDict or nested dict with the sections of `default_config`.

  Raises:
    ConfigError: A field is unknown, of the wrong type, or cannot be right.
  """
  fields = _as_dict(config)
  _check_names('config', fields, _TOP)
  sections = {
    name: None
    if fields.get(name) is None and name == 'quant'
    else _section(name, kind, fields.get(name) or {})
    for name, kind in _SECTIONS.items()
  }
  base = _convert('base', fields.get('base', DEFAULT_BASE), str)
  seed = _convert('seed', fields.get('seed', 0), int)
  return RunSpec(base=base, seed=seed, **sections)


def check_flag(name: str, value: str | None) -> None:
  """Says what is wrong with a flag that the config did not take.

  Args:
    name: Such as 'lora.rank'.
    value: Text that its type did not take; None where the name is in doubt.

  Raises:
    ConfigError: There is no such field, or it takes another type.
  """
  first, _, rest = name.partition('.')
  _check_names('config', {first: None}, _TOP)
  if first not in _SECTIONS:
    _convert(name, value, {'base': str, 'seed': int}[first])
    return
  hints = typing.get_type_hints(_SECTIONS[first])
  if not rest:
    _check_section(first, value or {})
    return
  _check_names(f'config.{first}', {rest: None}, list(hints))
  _convert(name, value, hints[rest])


def _as_dict(config: Any) -> dict[str, Any]:
  if isinstance(config, ml_collections.ConfigDict):
    return config.to_dict()
  return dict(config)


def _check_names(
  where: str, fields: Mapping[str, Any], known: list[str]
) -> None:
  for name in fields:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise ConfigError(
        f'{where} has no field {name!r}; did you mean {close!r}? It has'
        f' {", ".join(known)}'
      )


def _check_section(name: str, value: Any) -> None:
  if not isinstance(value, Mapping):
    raise ConfigError(
      f'config.{name} is {value!r}; it is a section: set its fields, such as'
      f' config.{name}.{dataclasses.fields(_SECTIONS[name])[0].name}'
    )


def _section(name: str, kind: Any, fields: Any) -> Any:
  _check_section(name, fields)
  hints = typing.get_type_hints(kind)
  known = [field.name for field in dataclasses.fields(kind)]
  _check_names(f'config.{name}', fields, known)
  values = {
    field: _convert(f'{name}.{field}', value, hints[field])
    for field, value in fields.items()
  }
  try:
    return kind(**values)
  except TypeError as error:
    missing = [f for f in known if f in str(error)]
    if not missing:
      raise
    raise ConfigError(
      f'config.{name} lacks {", ".join(missing)}; set it in the experiment'
    ) from error


def _convert(field: str, value: Any, hint: Any) -> Any:
  """Returns a value as the type its field declares, or refuses it."""
  kind = _plain(hint)
  if value is None or hint is Any:
    return value
  takes_tuple = 'tuple' in str(hint)
  if takes_tuple and isinstance(value, str) and value.startswith(_BRACKETS):
    value = _literal(field, value)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  whole = number and math.isfinite(value) and value == int(value)
  if kind is int and whole:
    return int(value)
  if kind in (bool, str) and isinstance(value, kind):
    return value
  if takes_tuple and isinstance(value, tuple | list | dict):
    return value
  if typing.get_origin(kind) is tuple and isinstance(value, str):
    return value
  if kind is float and number:
    return float(value)
  wanted = getattr(kind, '__name__', str(kind))
  if takes_tuple:
    wanted = "a list such as ['a', 'b'], or a dict such as {'NAME': VALUE}"
    wanted = f'a name, {wanted}' if kind is str else wanted
  raise ConfigError(f'config.{field} is {value!r}; it takes {wanted}')


def _literal(field: str, text: str) -> Any:
  """Reads a tuple, list or dict that was given on the command line."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
    if field.endswith(('targets', 'exclude', 'train_full', 'data.train')):
      return text  # an expression that starts with a group, or a file's name
    raise ConfigError(
      f'config.{field} is {text!r}, which cannot be read; write a list such as'
      " ['a', 'b'], or a dict such as {'NAME': VALUE}"
    ) from None


def check_sources(spec: RunSpec) -> None:
  """Requires that base and data can be opened, as far as that is quick.

  Args:
    spec: The resolved config.

  Raises:
    BaseModelError: The base is missing or of an unsafe format.
    DataError: A source is missing or unknown.
  """
  check_base(spec.base)
  endless = spec.data.train_examples is None and not spec.data.stream
  for source, _ in spec.data.sources:
    check_source(
      source,
      whole=not spec.data.stream,
      columns=columns_of(source, spec.data.columns),
    )
    if is_task(source) and endless:
      raise ConfigError(
        f'data.train {source!r} has no end; set data.train_examples, such as'
        ' 2000'
      )
    own = held_out_source(source) if spec.data.eval is None else None
    if own is not None:
      check_source(
        own,
        whole=not spec.data.stream,
        columns=columns_of(source, spec.data.columns),
      )
  if spec.data.eval is not None:
    check_source(
      spec.data.eval,
      split='eval',
      whole=not spec.data.stream,
      columns=columns_of(spec.data.eval, spec.data.columns),
    )


def from_json(text: str) -> RunSpec:
  """Returns the run whose `to_json` wrote a run folder's config.json."""
  return resolve(json.loads(text))
