"""What every front door does: read flags, run, answer with an exit code."""

import faulthandler
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from jlora.errors import ConfigError, JloraError

INTERRUPTED = 75  # stopped by a signal, after a complete checkpoint
_KILLED = 130  # stopped by a signal without one, as a shell counts it
# Before the fields of a run in the config of a comparison.
_SHARED = re.compile(r'^(quick\.)?(run|arms\.\w+)\.')
_EXAMPLE = 'experiments/qlora.py'
# What parsing raises: flags of absl, and whatever an experiment file runs into.
_MISTAKES = (
  flags.Error,
  ArithmeticError,
  AssertionError,
  AttributeError,
  ImportError,
  LookupError,
  NameError,
  OSError,
  RuntimeError,
  SyntaxError,
  TypeError,
  ValueError,
)


def enter(main: Callable[[], int | None]) -> NoReturn:
  """Parses the flags, runs `main` and exits.

  Exit codes: 0 done; 2 the user's input is wrong, said in one sentence; 3 the
  run stopped to protect data, or the disk refused; 75 stopped by a signal
  after a checkpoint; 130 stopped at once.

  Args:
    main: Returns an exit code, or None for 0.
  """

  def guarded(_: list[str]) -> int:
    # Threads of LAPACK wait in circles where cores are shared: a decomposition
    # took 2.8 s instead of 0.02 s.
    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
    logging.set_verbosity(logging.FATAL)  # what Orbax logs, it also raises
    # transformers would advise to install torch, which nothing here needs.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    warnings.showwarning = _show_warning
    try:
      return main() or 0
    except JloraError as error:
      _say(str(error))
      return _leave(error.exit_code)
    except OSError as error:
      _say(f'{error}; free or repair what it names, and run again')
      return _leave(3)
    except KeyboardInterrupt:
      _say('stopped at once; a run continues from its last checkpoint')
      return _leave(_KILLED)

  app.run(guarded, flags_parser=_parse)


_joined: list[int] = []  # the index of this process, where there are several


def join(
  coordinator: str | None, processes: int | None, process: int | None
) -> None:
  """Connects this process with others that run the same command.

  Args:
    coordinator: As in `jlora.parallel.processes.connect`.
    processes: Likewise.
    process: Likewise.

  Raises:
    ConfigError: They cannot be connected.
  """
  from jlora.parallel.processes import connect

  connect(coordinator, processes, process)
  import jax

  def end(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Says what nobody has caught, and ends this process at once."""
    if not issubclass(kind, jax.errors.JaxRuntimeError):
      sys.__excepthook__(kind, error, trace)
      _leave(1)
    _say(
      f'a computation of all processes failed: {error}; if another one ended,'
      ' its message says why. The same command on all hosts continues from the'
      ' last checkpoint'
    )
    _leave(3)

  _joined.append(jax.process_index())
  sys.excepthook = end
  # Where another process fails, jax aborts this one with a message, which a
  # list of all loaded modules would bury.
  faulthandler.disable()


def _leave(code: int) -> int:
  """Returns an exit code, or ends at once where other processes wait.

  They wait for this one, and would for minutes: its end is what tells them.
  """
  if _joined:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def _say(text: str) -> None:
  who = f'jlora, process {_joined[0]}:' if _joined else 'jlora:'
  print(who, ' '.join(text.split()), file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any) -> None:
  _say(f'warning: {message}')


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except _MISTAKES as error:
    _say(_refusal(argv, error))
    sys.exit(2)
  if len(rest) > 1:
    _say(f'unknown argument {rest[1]!r}; see --help')
    sys.exit(2)
  return rest


def _refusal(argv: list[str], error: Exception) -> str:
  """Returns in one sentence what is wrong with the arguments."""
  while 'whilst parsing config file' in str(error) and error.__context__:
    error = error.__context__  # absl has put the traceback into the message
  for argument in argv:
    name, _, value = argument.partition('=')
    if name == '--config' and not os.path.isfile(value):
      return f'--config={value} does not exist; name a file such as {_EXAMPLE}'
    if name == '--config' and (line := _line_in(value, error)):
      what = f'{type(error).__name__}: {error}'
      return f'--config={value} fails in line {line} with {what}; mend it'
  if isinstance(error, flags.UnrecognizedFlagError):
    return f'{error}; see --help'
  return _config_refusal(argv, error)


def _line_in(file: str, error: Exception) -> int | None:
  """Returns the line of a file that an error comes from, if it does."""
  if isinstance(error, SyntaxError):
    return error.lineno
  lines = (
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if os.path.abspath(frame.filename) == os.path.abspath(file)
  )
  return next(lines, None)


def _config_refusal(argv: list[str], error: Exception) -> str:
  """Returns which flag of the config is wrong, and why."""
  from jlora.config import check_flag

  text = str(error)
  for argument in argv:
    name, _, value = argument.partition('=')
    field = name.removeprefix('--config.')
    if field == name:
      continue
    field = _SHARED.sub('', field)
    if f'field "{field.split(".")[0]}" is None' in text:
      return (
        f'{argument} sets a field of a section that is None in this'
        f' experiment; start from one that has it, such as {_EXAMPLE}'
      )
    unknown = isinstance(error, AttributeError | KeyError)
    if unknown or f'{name}=' in text:
      try:
        check_flag(field, None if unknown else value)
      except ConfigError as refusal:
        return str(refusal)
  return f'{text}; see --help'


def config_of(flag: Any) -> Any:
  """Returns the ConfigDict of a `--config` flag.

  Args:
    flag: From `config_flags.DEFINE_config_file`.

  Raises:
    ConfigError: The flag is missing, or its file cannot be read.
  """
  if flag.value is None:
    raise ConfigError(f'--config is missing; try --config={_EXAMPLE}')
  try:
    flag.value.keys()
  except OSError as error:
    name = config_flags.get_config_filename(flags.FLAGS[flag.name])
    raise ConfigError(
      f'--config={name} cannot be read; name a file such as {_EXAMPLE}'
    ) from error
  return flag.value


def default_workdir(flag: Any) -> pathlib.Path:
  """Returns `runs/NAME`, NAME being that of the config's file.

  Args:
    flag: From `config_flags.DEFINE_config_file`.
  """
  name = config_flags.get_config_filename(flags.FLAGS[flag.name])
  return pathlib.Path('runs') / pathlib.Path(name).stem
