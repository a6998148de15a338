"""Checks of single fields, shared by the sections of a config."""

from typing import Any

from jlora.errors import ConfigError


def require(section: str, spec: Any, *fields: str, least: int = 1) -> None:
  """Requires that numbers are not too small; None is fine.

  Args:
    section: Of the config, for the message.
    spec: What has the fields.
    *fields: Their names.
    least: The smallest that each may be.

  Raises:
    ConfigError: One is smaller.
  """
  for field in fields:
    value = getattr(spec, field)
    if value is not None and value < least:
      raise ConfigError(
        f'{section}.{field} is {value}; it must be {least} or more'
      )


def choose(section: str, spec: Any, **fields: tuple[str, ...]) -> None:
  """Requires that words are among those that a field takes.

  Args:
    section: Of the config, for the message.
    spec: What has the fields.
    **fields: What each takes.

  Raises:
    ConfigError: One is another.
  """
  for field, choices in fields.items():
    value = getattr(spec, field)
    if value not in choices:
      raise ConfigError(f'{section}.{field} {value!r} is none of {choices}')
