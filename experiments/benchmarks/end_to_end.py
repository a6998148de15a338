r"""How many tokens of conversations are trained on in a second, beside PEFT.

  python experiments/benchmarks/end_to_end.py

  --data=SOURCE      as config.data.train; several are mixed
  --method=lora      or qlora
  --remat=dots       of ours; or none, or full, which is then full of PEFT too
  --batch --length   of the packed rows
  --rank --steps
  --rounds=5 --add --cache=DIR --render, as in train_step.py

Ours packs conversations into rows; PEFT gets the same rows, and also batches of
as many conversations, padded to the longest of each. What counts is tokens,
not padding.
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from absl import flags

from experiments.benchmarks.harness import doors
from experiments.benchmarks.harness.packing import Packing
from jlora import door

_DATA = flags.DEFINE_multi_string(
  'data',
  [
    'reasoning_gym:family_relationships',
    'reasoning_gym:letter_counting',
    'reasoning_gym:knights_knaves',
    'reasoning_gym:course_schedule',
    'reasoning_gym:chain_sum',
  ],
  'Sources of conversations.',
)
_METHOD = flags.DEFINE_enum('method', 'lora', ['lora', 'qlora'], 'What step.')
_REMAT = flags.DEFINE_enum(
  'remat', 'dots', ['none', 'dots', 'full'], 'What is kept.'
)
_BATCH = flags.DEFINE_integer('batch', 4, 'Rows a step.')
_LENGTH = flags.DEFINE_integer('length', 256, 'Tokens a row.')
_RANK = flags.DEFINE_integer('rank', 16, 'Of the adapters.')
_STEPS = flags.DEFINE_integer('steps', 8, 'Timed steps of each process.')


def main() -> None:
  """Checks the flags, then runs the arms."""
  if doors.rendered():
    return
  doors.check()
  doors.require_least((_BATCH, 1), (_LENGTH, 2), (_RANK, 1), (_STEPS, 1))
  with tempfile.TemporaryDirectory(prefix='jlora-benchmark-') as folder:
    packing = Packing(
      folder=pathlib.Path(folder),
      sources=tuple(_DATA.value),
      method=_METHOD.value,
      remat=_REMAT.value,
      batch=_BATCH.value,
      length=_LENGTH.value,
      rank=_RANK.value,
      steps=_STEPS.value,
    )
    packing.run()


if __name__ == '__main__':
  door.enter(main)
