r"""Trains: `python -m jlora.train --config=experiments/qlora.py`.

  --config=FILE            an experiment with get_config()
  --config.SECTION.FIELD=  changes one field of it
  --workdir=DIR            the run's folder; default runs/<name of the config>

The same command again continues a run that was stopped.
"""

from absl import flags
from ml_collections import config_flags

from jlora import config, door

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')


def main() -> int:
  """Resolves the config, then trains."""
  spec = config.resolve(door.config_of(_CONFIG))
  config.check_sources(spec)
  # Heavy imports come after the checks, so a refusal is quick.
  from rich.console import Console

  from jlora.training.loop import train

  console = Console(soft_wrap=True, highlight=False)
  ended = train(spec, _WORKDIR.value or door.default_workdir(_CONFIG), console)
  return 0 if ended else door.INTERRUPTED


if __name__ == '__main__':
  door.enter(main)
