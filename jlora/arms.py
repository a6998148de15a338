"""The arms of a comparison, read from its config."""

from collections.abc import Mapping
from typing import Any

from jlora import config
from jlora.errors import ConfigError
from jlora.training.comparison_spec import ComparisonSpec
from jlora.training.run_spec import RunSpec

_FIELDS = ('run', 'arms', 'seeds', 'grid', 'timing', 'quick')
_TIMING = ('rounds', 'steps')


def resolve(fields: Mapping[str, Any], *, quick: bool) -> ComparisonSpec:
  """Returns the comparison that a config describes.

  Args:
    fields: `run`, which all arms share; `arms`, what each changes of it;
      `seeds`, `grid`, `timing`; and `quick`, what --quick changes of all this.
    quick: Whether to take the quick form.

  Raises:
    ConfigError: A field is unknown, of the wrong type, or cannot be right, or
      the arms cannot be compared.
  """
  _check_names('config', fields, _FIELDS)
  if quick:
    changes = fields.get('quick') or {}
    _check_names('config.quick', changes, _FIELDS)
    fields = merged(fields, changes)
  if not (fields.get('run') and fields.get('arms')):
    raise ConfigError(
      'config has no `run` or no `arms`; see experiments/compare.py'
    )
  timing = fields.get('timing') or {}
  _check_names('config.timing', timing, _TIMING)
  return ComparisonSpec(
    arms={
      name: _arm(name, fields['run'], changes or {})
      for name, changes in fields['arms'].items()
    },
    seeds=_numbers('seeds', fields.get('seeds', (0,)), int),
    grid=_numbers('grid', fields.get('grid', ()), float),
    **{f'timing_{name}': int(value) for name, value in timing.items()},
  )


def merged(
  fields: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns nested fields with changes written over them.

  Args:
    fields: A nested dict.
    changes: Likewise; what is no dict replaces what was there.
  """
  result = dict(fields)
  for name, change in changes.items():
    old = result.get(name)
    both = isinstance(old, Mapping) and isinstance(change, Mapping)
    result[name] = merged(old, change) if both else change
  return result


def _arm(
  name: str, run: Mapping[str, Any], changes: Mapping[str, Any]
) -> RunSpec:
  try:
    return config.resolve(merged(run, changes))
  except ConfigError as error:
    raise ConfigError(f'arm {name!r}: {error}') from error


def _check_names(
  where: str, fields: Mapping[str, Any], known: tuple[str, ...]
) -> None:
  for name in fields:
    if name not in known:
      raise ConfigError(
        f'{where} of a comparison has no field {name!r}; it has'
        f' {", ".join(known)}, see experiments/compare.py'
      )


def _numbers(name: str, values: Any, kind: type) -> tuple[Any, ...]:
  if not isinstance(values, tuple | list):
    raise ConfigError(f'config.{name} is {values!r}; it takes a tuple')
  for value in values:
    if isinstance(value, bool) or not isinstance(value, int | kind):
      raise ConfigError(
        f'config.{name} holds {value!r}; it takes {kind.__name__} values'
      )
  return tuple(kind(value) for value in values)
