r"""Trains: `python -m jlora.train --config=experiments/qlora.py`.

  --config=FILE            an experiment with get_config()
  --config.SECTION.FIELD=  changes one field of it
  --workdir=DIR            the run's folder; default runs/<name of the config>
  --profile                traces a few steps into profile/ of that folder

The same command again continues a run that was stopped.

On several hosts, run it once on each, with a --workdir that all of them see:

  --distributed      JAX finds the others: SLURM, Open MPI, Kubernetes, TPUs
  --coordinator=HOST:PORT --processes=N --process=I       they are named
"""

from absl import flags
from ml_collections import config_flags

from jlora import config, door

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_PROFILE = flags.DEFINE_bool('profile', False, 'Trace a few steps.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Find other processes.')
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of the first process.'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which one this is, from 0.')


def main() -> int:
  """Resolves the config, then trains."""
  spec = config.resolve(door.config_of(_CONFIG))
  cluster = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if _DISTRIBUTED.value or cluster != (None, None, None):
    door.join(*cluster)  # first, so that a refusal in one ends all of them
  config.check_sources(spec)
  # Heavy imports come after the checks, so a refusal is quick.
  from rich.console import Console

  from jlora.parallel import processes
  from jlora.training.loop import train

  console = Console(
    soft_wrap=True, highlight=False, quiet=not processes.is_first()
  )
  workdir = _WORKDIR.value or door.default_workdir(_CONFIG)
  ended = train(spec, workdir, console, profile=_PROFILE.value)
  return 0 if ended else door.INTERRUPTED


if __name__ == '__main__':
  door.enter(main)
