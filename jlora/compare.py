r"""Compares: `python -m jlora.compare --config=experiments/compare.py`.

  --workdir=DIR     where the runs, comparison.json, report.md and figures go;
                    default runs/<name of the config>
  --quick           the config's short form, but for fields that flags set
  --config.run.SECTION.FIELD=        changes every arm
  --config.arms.ARM.SECTION.FIELD=   changes one

Each run is a process of its own and leaves an ordinary run folder. The same
command again continues a comparison that was stopped.
"""

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from jlora import arms, config, door
from jlora.errors import ConfigError

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Comparison.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the comparison.')
_QUICK = flags.DEFINE_bool('quick', False, 'The short form of the config.')


def main() -> int:
  """Resolves the arms, then compares them."""
  if _CONFIG.value is None:
    raise ConfigError(
      '--config is missing; try --config=experiments/compare.py'
    )
  fields = door.config_of(_CONFIG).to_dict()
  given = config_flags.get_override_values(flags.FLAGS['config'])
  spec = arms.resolve(fields, quick=_QUICK.value, given=given)
  for run in spec.arms.values():
    config.check_sources(run)
  # Heavy imports come after the checks, so a refusal is quick.
  from rich.console import Console

  from jlora.comparison.compare import compare

  ended = compare(
    spec,
    _WORKDIR.value or door.default_workdir(_CONFIG),
    Console(soft_wrap=True),
    command=shlex.join(['python', '-m', 'jlora.compare', *sys.argv[1:]]),
  )
  return 0 if ended else door.INTERRUPTED


if __name__ == '__main__':
  door.enter(main)
