r"""Says what a run will take on a machine that need not be here.

  python -m jlora.plan --config=experiments/qlora.py --target=h100

  --config=FILE            an experiment with get_config()
  --config.SECTION.FIELD=  changes one field of it
  --target=NAME[,NAME]     cpu, h100, rtx4090, gpu-12gb, h100-8, v5e-16, …
  --sweep                  rows of all lengths, as a table and a figure
  --nosearch               one compile a target: no largest microbatch
  --out=DIR                writes what is printed there, and as JSON

The train step is compiled by the target's own compiler (extras `cuda13` and
`tpu`); without it, bytes are counted. Of the base only the sizes are read:
`--config.base` may also be a config.json.
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags

from jlora import config, door
from jlora.errors import ConfigError
from jlora.parallel.machines import find_machine, known

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Experiment.')
_TARGET = flags.DEFINE_list('target', None, f'Machines: {known()}.')
_SWEEP = flags.DEFINE_bool('sweep', False, 'Whether to try all lengths.')
_SEARCH = flags.DEFINE_bool('search', True, 'Whether to look for what fits.')
_OUT = flags.DEFINE_string('out', None, 'Folder for tables and figures.')


def main() -> None:
  """Checks the flags, then plans."""
  # What a compiler says of a program that is too large, the plan says too.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  spec = config.resolve(door.config_of(_CONFIG))
  if not _TARGET.value:
    raise ConfigError('--target is missing; try --target=h100, or cpu')
  machines = [find_machine(name) for name in _TARGET.value]

  import jax
  from rich.console import Console

  from jlora.planning import report
  from jlora.planning.planner import Planner
  from jlora.planning.sizes import read_sizes

  jax.config.update('jax_platforms', 'cpu')  # nothing runs on a device
  console = Console(soft_wrap=True, highlight=False, markup=False)
  sizes = read_sizes(spec.base)
  planners = [Planner(sizes, machine) for machine in machines]
  out = _OUT.value and pathlib.Path(_OUT.value)
  if _SWEEP.value:
    report.plan_sweep(planners, spec, console, out or pathlib.Path('runs/plan'))
  else:
    report.plan(planners, spec, console, search=_SEARCH.value, out=out)


if __name__ == '__main__':
  door.enter(main)
