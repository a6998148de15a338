"""What jlora raises: one class per kind of fault, each with an exit code.

A front door prints the message as one sentence and exits with `exit_code`; a
message holds the value that was refused and what to do instead.
"""


class JloraError(Exception):
  """Base of every error that jlora raises on purpose.

  Attributes:
    exit_code: What the command line returns: 2 where the user's input is
      wrong, 3 where the run stopped to protect data.
  """

  exit_code = 2


class ConfigError(JloraError, ValueError):
  """A field, a pattern or a combination of them cannot be right."""


class MissingCompilerError(ConfigError):
  """The compiler of a target is not installed, or cannot be reached."""


class DataError(JloraError, ValueError):
  """A data source is missing, malformed or empty."""


class BaseModelError(JloraError, ValueError):
  """A base model cannot be found, read or understood."""


class AdapterError(JloraError, ValueError):
  """An adapter does not fit its base, or its files are not whole."""


class CheckpointError(JloraError, RuntimeError):
  """A checkpoint cannot be saved, or none can be restored."""

  exit_code = 3


class NonFiniteError(JloraError, ArithmeticError):
  """The loss or its gradient stopped being finite for too many steps."""

  exit_code = 3
