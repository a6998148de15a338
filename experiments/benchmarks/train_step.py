r"""How long a LoRA step takes, and how much memory, beside PEFT and others.

  python experiments/benchmarks/train_step.py \
    --peer=peft --peer=qwix --peer=bare

  --peer=NAME        peft, with bitsandbytes for QLoRA; qwix, on our decoder;
                     bare, a step written by hand; or lora, ours on dense
                     weights; several of them. qwix:none is Qwix with that
                     policy, whatever --remat says
  --method=lora      or qlora: kernels in NF4
  --remat=best       each arm's fastest of none, dots and full; or one of these
  --model=BASE       SmolLM2-135M-Instruct; or layers=60,vocab=32000 for random
                     weights of its other sizes, or a config.json likewise
  --batch --length --rank --steps
  --double=WHAT      also ours with twice the batch, length, layers, vocab_size
  --rounds=5         how often each arm is run, each time in a fresh process
  --add              adds rounds to those in the file of the result
  --cache=DIR        keeps compiled programs, so that a later call starts warm
  --render           only writes the tables of all results to README.md

Arms are run in turn, A B A B …, and speeds are compared within each round. All
read the same weights, in float32, and the same tokens. It prints a table and
writes it with all figures to results/. The peers come with
`pip install -e '.[bench]'`; one that is missing is said, and left out.
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from absl import flags

from experiments.benchmarks.harness import doors, models
from experiments.benchmarks.harness.contest import DOUBLES, PEERS, Contest
from jlora import door

_PEER = flags.DEFINE_multi_enum('peer', [], PEERS, 'Compared with ours.')
_METHOD = flags.DEFINE_enum('method', 'lora', ['lora', 'qlora'], 'What step.')
_REMAT = flags.DEFINE_enum(
  'remat', 'best', ['best', 'none', 'dots', 'full'], 'What is kept.'
)
_MODEL = flags.DEFINE_string('model', None, 'Base, sizes or config.json.')
_BATCH = flags.DEFINE_integer('batch', 4, 'Rows a step.')
_LENGTH = flags.DEFINE_integer('length', 256, 'Tokens a row.')
_RANK = flags.DEFINE_integer('rank', 16, 'Of the adapters.')
_STEPS = flags.DEFINE_integer('steps', 5, 'Timed steps of each process.')
_DOUBLE = flags.DEFINE_multi_enum(
  'double', [], DOUBLES, 'What ours is also run with twice of.'
)


def main() -> None:
  """Checks the flags, then runs the arms."""
  if doors.rendered():
    return
  doors.check()
  doors.require_least((_BATCH, 1), (_LENGTH, 2), (_RANK, 1), (_STEPS, 1))
  with tempfile.TemporaryDirectory(prefix='jlora-benchmark-') as folder:
    contest = Contest(
      folder=pathlib.Path(folder),
      model=models.find_model(_MODEL.value),
      label=_MODEL.value or 'SmolLM2-135M',
      peers=tuple(dict.fromkeys(_PEER.value)),
      doubled=tuple(dict.fromkeys(_DOUBLE.value)),
      method=_METHOD.value,
      remat=_REMAT.value,
      batch=_BATCH.value,
      length=_LENGTH.value,
      rank=_RANK.value,
      steps=_STEPS.value,
    )
    contest.run()


if __name__ == '__main__':
  door.enter(main)
