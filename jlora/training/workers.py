"""Training runs in fresh processes, so that no run sees another's memory."""

import os
import pathlib
import pprint
import subprocess
import sys

from jlora.errors import JloraError
from jlora.training.run_spec import RunSpec
from jlora.training.signals import StopRequest

_INTERRUPTED = 75  # what `jlora.train` exits with after a signal
_POLL_SECONDS = 0.2
_CONFIG = '''"""Written by jlora.compare.

python -m jlora.train --config={config} --workdir={folder}
"""

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


def train_apart(
  spec: RunSpec, folder: pathlib.Path, fields: dict[str, object]
) -> bool:
  """Trains in a fresh process, with its output shown here.

  Beside the run folder, `<folder>.py` holds the run's config and
  `<folder>.log` what the process wrote to stderr.

  Args:
    spec: The run.
    folder: Its run folder.
    fields: `spec` as a nested dict of JSON values.

  Returns:
    Whether the run ended; False where a signal stopped it.

  Raises:
    WorkerError: The run failed. The message is the one it gave.
  """
