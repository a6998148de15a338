"""Training runs in fresh processes, so that no run sees another's memory."""

import json
import pathlib
import pprint
import subprocess
import sys
import textwrap

from jlora.errors import JloraError
from jlora.training.run_spec import RunSpec
from jlora.training.signals import StopRequest

_TRAIN = (sys.executable, '-m', 'jlora.train')
_INTERRUPTED = 75  # what `jlora.train` exits with after a signal
_POLL_SECONDS = 0.2
_PREFIX = 'jlora: '  # of what a front door says on stderr
_WARNING = f'{_PREFIX}warning: '
_EXPERIMENT = '''"""The run in this folder, as jlora.compare started it."""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
{fields}
  )
'''


class WorkerError(JloraError):
  """A run in a process of its own failed."""

  def __init__(self, message: str, exit_code: int):
    """Takes over the exit code of the process.

    Args:
      message: One sentence.
      exit_code: For the command line.
    """
    super().__init__(message)
    self.exit_code = exit_code


def train_apart(spec: RunSpec, folder: pathlib.Path) -> bool:
  """Trains in a fresh process that shares this one's stdout.

  The run folder also gets `experiment.py`, the run's config, and `stderr.log`.

  Args:
    spec: The run.
    folder: Its run folder.

  Returns:
    Whether the run ended; False where a signal stopped it. SIGINT and SIGTERM
    are passed on, and the run saves a checkpoint first.

  Raises:
    WorkerError: The run failed; the message is its own.
  """
  folder.mkdir(parents=True, exist_ok=True)
  experiment = folder / 'experiment.py'
  fields = pprint.pformat(json.loads(spec.to_json()), width=72)
  experiment.write_text(
    _EXPERIMENT.format(fields=textwrap.indent(fields, ' ' * 4))
  )
  log = folder / 'stderr.log'
  flags = [f'--config={experiment}', f'--workdir={folder}']
  code = _run([*_TRAIN, *flags], log)
  said = log.read_text(errors='replace').splitlines()
  for line in said:
    if line.startswith(_WARNING):
      print(line, file=sys.stderr)
  if code in (0, _INTERRUPTED):
    return code == 0
  raise _failure(folder, code, said)


def _run(command: list[str], log: pathlib.Path) -> int:
  """Runs a command to its end and returns its exit code."""
  # In a session of its own, so that Ctrl-C reaches the run once, through here:
  # the second signal makes it leave without a checkpoint.
  with log.open('w') as stderr, StopRequest() as stop:
    process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
    try:
      passed_on = False
      while True:
        try:
          code = process.wait(_POLL_SECONDS)
          return _INTERRUPTED if passed_on else code
        except subprocess.TimeoutExpired:
          if stop.requested and not passed_on:
            process.terminate()
            passed_on = True
    finally:
      process.kill()  # does nothing once it has ended


def _failure(folder: pathlib.Path, code: int, said: list[str]) -> WorkerError:
  """Returns the error for an exit code and the lines of stderr."""
  reasons = [
    line.removeprefix(_PREFIX)
    for line in said
    if line.startswith(_PREFIX) and not line.startswith(_WARNING)
  ]
  if code in (2, 3) and reasons:
    return WorkerError(f'{folder.name}: {reasons[-1]}', code)
  end = f'ended with exit code {code}'
  if code < 0:
    end = f'was killed by signal {-code}, perhaps for want of memory'
  return WorkerError(
    f'the run in {folder} {end}; see {folder / "stderr.log"}, and run again to'
    ' continue',
    1,
  )
