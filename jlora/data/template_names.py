"""Which names a chat template reads, outside its comments and its own words."""

import functools
from collections.abc import Iterator

import jinja2

from jlora.data.turns import THINKING
from jlora.errors import DataError


@functools.lru_cache(maxsize=8)
def variables_of(template: str) -> frozenset[str]:
  """Returns the variables that a template names, such as `tools`.

  Args:
    template: Of jinja.

  Raises:
    DataError: It is none.
  """
  words = _words(template)
  return frozenset(w for kind, w in words if kind == 'variable')


@functools.lru_cache(maxsize=8)
def fields_of(template: str) -> frozenset[str]:
  """Returns the fields of a turn that a template may read.

  That is whatever it names after a dot, or in quotes.

  Args:
    template: Of jinja.

  Raises:
    DataError: It is none.
  """
  return frozenset(w for kind, w in _words(template) if kind == 'field')


def thinking_field(template: str) -> str | None:
  """Returns under which name a template reads what was thought; maybe None.

  Args:
    template: Of jinja.
  """
  return next((n for n in THINKING if n in fields_of(template)), None)


def _words(template: str) -> Iterator[tuple[str, str]]:
  """Yields the names of a template, each as a variable or as a field."""
  before = ''
  try:
    for _, kind, text in jinja2.Environment().lex(template):
      if kind == 'name':
        yield ('field' if before == '.' else 'variable'), text
      elif kind == 'string':
        yield 'field', text[1:-1]
      before = before if kind == 'whitespace' else text
  except (jinja2.TemplateError, RecursionError) as error:
    raise DataError(
      f'the chat template of the base cannot be read: {error}; use another base'
    ) from error
