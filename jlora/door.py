"""What every front door does: read flags, run, answer with an exit code."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from jlora.errors import ConfigError, JloraError

INTERRUPTED = 75  # stopped by a signal, after a complete checkpoint


def enter(main: Callable[[], int | None]) -> NoReturn:
  """Parses the flags, runs `main` and exits.

  Exit codes: 0 done; 2 the user's input is wrong, said in one sentence; 3 the
  run stopped to protect data; 75 stopped by a signal after a checkpoint.

  Args:
    main: Returns an exit code, or None for 0.
  """

  def guarded(_: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # Orbax tells a page a checkpoint
    try:
      return main() or 0
    except JloraError as error:
      print(f'jlora: {error}', file=sys.stderr)
      return error.exit_code

  app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    text = ' '.join(str(e).replace("\\'", "'").strip('"\'').split())
    print(f'jlora: {text}; see --help', file=sys.stderr)
    sys.exit(2)
  if len(rest) > 1:
    print(f'jlora: unknown argument {rest[1]!r}; see --help', file=sys.stderr)
    sys.exit(2)
  return rest


def config_of(flag: Any) -> Any:
  """Returns the ConfigDict of a `--config` flag.

  Args:
    flag: From `config_flags.DEFINE_config_file`.

  Raises:
    ConfigError: The flag is missing, or its file cannot be read.
  """
  if flag.value is None:
    raise ConfigError('--config is missing; try --config=experiments/qlora.py')
  try:
    flag.value.keys()
  except OSError as error:
    raise ConfigError(f'--config cannot be read: {error}') from error
  return flag.value
