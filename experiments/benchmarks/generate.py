r"""How fast tokens are generated, greedily, beside transformers and PEFT.

  python experiments/benchmarks/generate.py

  --batch=1          rows
  --prompt --new     tokens of each prompt, and new ones
  --rank             of the adapters
  --rounds=5 --add --cache=DIR --render, as in train_step.py

Arms: jlora on dense weights, with an adapter on NF4, and the same merged before
the first token, as `jlora.generate --merge` does; transformers on dense
weights, with an adapter of PEFT on them, and with one on bitsandbytes' NF4.
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from absl import flags

from experiments.benchmarks.harness import doors, generators
from experiments.benchmarks.harness.models import find_model
from jlora import door

_BATCH = flags.DEFINE_integer('batch', 1, 'Rows.')
_PROMPT = flags.DEFINE_integer('prompt', 64, 'Tokens of each prompt.')
_NEW = flags.DEFINE_integer('new', 64, 'New tokens of each row.')
_RANK = flags.DEFINE_integer('rank', 16, 'Of the adapters.')


def main() -> None:
  """Checks the flags, then runs the arms."""
  if doors.rendered():
    return
  doors.check()
  doors.require_least((_BATCH, 1), (_PROMPT, 1), (_NEW, 3), (_RANK, 1))
  settings = {f.name: f.value for f in (_BATCH, _PROMPT, _NEW, _RANK)}
  with tempfile.TemporaryDirectory(prefix='jlora-benchmark-') as folder:
    place = pathlib.Path(folder) / 'model'
    generators.compare(settings, find_model(None), place)


if __name__ == '__main__':
  door.enter(main)
