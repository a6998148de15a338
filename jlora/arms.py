"""The arms of a comparison, read from its config."""

from collections.abc import Iterable, Mapping
from typing import Any

from jlora import config
from jlora.comparison.spec import ComparisonSpec
from jlora.errors import ConfigError
from jlora.training.run_spec import RunSpec

_FIELDS = ('run', 'arms', 'seeds', 'grid', 'timing', 'quick')
_TIMING = ('rounds', 'steps')


def resolve(
  fields: Mapping[str, Any], *, quick: bool, given: Iterable[str] = ()
) -> ComparisonSpec:
  """Returns the comparison that a config describes.

  Args:
    fields: `run`, which all arms share; `arms`, what each changes of it;
      `seeds`, `grid`, `timing`; and `quick`, what --quick changes of all this.
    quick: Whether to take the quick form.
    given: Fields that the user set, such as `run.train.steps`; the quick form
      leaves them.

  Raises:
    ConfigError: A field is unknown, of the wrong type, or cannot be right, or
      the arms cannot be compared.
  """
  _check_names('config', fields, _FIELDS)
  if quick:
    changes = _section('config.quick', fields.get('quick'))
    _check_names('config.quick', changes, _FIELDS)
    for name in given:
      changes = _without(changes, name.split('.'))
    fields = merged(fields, changes)
  run = _section('config.run', fields.get('run'))
  arms = _section('config.arms', fields.get('arms'))
  timing = _section('config.timing', fields.get('timing'))
  _check_names('config.timing', timing, _TIMING)
  if not run or not arms:
    raise ConfigError(
      'config has no `run` or no `arms`; see experiments/compare.py'
    )
  return ComparisonSpec(
    arms={name: _arm(name, run, changes) for name, changes in arms.items()},
    seeds=_numbers('seeds', fields.get('seeds', (0,)), int),
    grid=_numbers('grid', fields.get('grid', ()), float),
    **{
      f'timing_{name}': _numbers(f'timing.{name}', (value,), int)[0]
      for name, value in timing.items()
    },
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


def _without(fields: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
  """Returns nested fields but for the one at a path, if it is there."""
  first, *rest = path
  result = dict(fields)
  if rest and isinstance(result.get(first), Mapping):
    result[first] = _without(result[first], rest)
  else:
    result.pop(first, None)
  return result


def _arm(name: str, run: Mapping[str, Any], changes: Any) -> RunSpec:
  changes = _section(f'config.arms.{name}', changes)
  try:
    return config.resolve(merged(run, changes))
  except ConfigError as error:
    raise ConfigError(f'arm {name!r}: {error}') from error


def _section(where: str, value: Any) -> Mapping[str, Any]:
  if value is not None and not isinstance(value, Mapping):
    raise ConfigError(
      f'{where} is {value!r}; it is a section, see experiments/compare.py'
    )
  return value or {}


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
