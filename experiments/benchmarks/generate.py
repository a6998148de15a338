r"""How fast tokens are generated, greedily, beside transformers and PEFT.

  python experiments/benchmarks/generate.py

  --batch=1          rows
  --prompt --new     tokens of each prompt, and new ones
  --rank             of the adapters
  --rounds=5 --add --cache=DIR --render, as in train_step.py

Arms: jlora on dense weights, and with an adapter on NF4; transformers on dense
weights, and with an adapter of PEFT on them.
"""

import dataclasses
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from absl import flags

from experiments.benchmarks.harness import doors
from experiments.benchmarks.harness.generation import Work
from experiments.benchmarks.harness.models import find_model
from experiments.benchmarks.harness.processes import Arm
from experiments.benchmarks.harness.results import Column
from jlora import door

_BATCH = flags.DEFINE_integer('batch', 1, 'Rows.')
_PROMPT = flags.DEFINE_integer('prompt', 64, 'Tokens of each prompt.')
_NEW = flags.DEFINE_integer('new', 64, 'New tokens of each row.')
_RANK = flags.DEFINE_integer('rank', 16, 'Of the adapters.')
_PLACE = 'experiments.benchmarks.arms'
_ARMS = (
  ('jlora', 'generate_ours', 'dense'),
  ('jlora NF4 + adapter', 'generate_ours', 'nf4'),
  ('transformers', 'generate_peft', 'dense'),
  ('PEFT', 'generate_peft', 'adapter'),
)
_COLUMNS = (
  Column('tokens_per_s', 'tokens/s'),
  Column('prefill_s', 'prefill, s', digits=2),
  Column('token_s', 'ms a token', 1e-3),
  Column('peak_bytes', 'process peak, GiB', 2**30, 2),
  Column('compile_s', 'compile, s'),
)


def main() -> None:
  """Checks the flags, then runs the arms."""
  if doors.rendered():
    return
  doors.check()
  doors.require_least((_BATCH, 1), (_PROMPT, 1), (_NEW, 3), (_RANK, 1))
  settings = {f.name: f.value for f in (_BATCH, _PROMPT, _NEW, _RANK)}
  with tempfile.TemporaryDirectory(prefix='jlora-benchmark-') as folder:
    place = pathlib.Path(folder) / 'model'
    find_model(None).write(place)
    arms = [
      Arm(
        title,
        f'{_PLACE}.{module}',
        dataclasses.asdict(Work(kind=kind, folder=str(place), **settings)),
      )
      for title, module, kind in _ARMS
    ]
    size = f'{_BATCH.value}x{_PROMPT.value}+{_NEW.value}'
    benchmark = doors.Benchmark(
      name='generate',
      file=f'generate-{size}',
      ours='jlora',
      columns=_COLUMNS,
      settings=settings,
    )
    with doors.limits() as limits:
      doors.run(benchmark, arms, limits)


if __name__ == '__main__':
  door.enter(main)
