"""The arms of `end_to_end.py`, and what each is asked for."""

import dataclasses
import pathlib

from experiments.benchmarks.harness import conversations, doors, training
from experiments.benchmarks.harness.agreement import disagreements
from experiments.benchmarks.harness.contest import CLOSE, PLACE
from experiments.benchmarks.harness.models import find_model
from experiments.benchmarks.harness.processes import Arm
from experiments.benchmarks.harness.results import Column
from experiments.benchmarks.harness.rounds import Rounds
from jlora import config
from jlora.config import check_sources
from jlora.training.run_spec import RunSpec

OURS = 'jlora, packed'
ARMS = {  # by title: the module, and which batches it reads
  OURS: ('ours', 'packed'),
  'peft, packed': ('peft', 'packed'),
  'peft, padded': ('peft', 'padded'),
}
COLUMNS = (
  Column('step_s', 's a step', digits=2),
  Column('tokens_per_s', 'useful tokens/s', digits=0),
  Column('peak_bytes', 'process peak, GiB', 2**30, 2),
  Column('loss', 'first loss', digits=4),
)
_EXAMPLES = 3000  # drawn of the sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
  """Ours and PEFT on conversations.

  Attributes:
    folder: For weights and batches.
    sources: As `data.train` of a config has them.
    method: As in `training.Work`.
    remat: Likewise, of ours.
    batch: Packed rows a step.
    length: Tokens a row, and the most that a conversation may have.
    rank: As in `training.Work`.
    steps: Likewise.
  """

  folder: pathlib.Path
  sources: tuple[str, ...]
  method: str
  remat: str
  batch: int
  length: int
  rank: int
  steps: int

  def run(self) -> None:
    """Writes weights and batches, runs the arms and writes the result.

    Raises:
      JloraError: The data are wrong, or see `doors.run`.
    """
    spec = self._spec()
    check_sources(spec)
    find_model(None).write(self.folder / 'model')
    facts = conversations.write(self.folder / 'model', spec, self.steps + 1)
    benchmark = doors.Benchmark(
      name='end_to_end',
      file=(
        f'end_to_end-{self.method}-{self.remat}-{self.batch}x{self.length}'
        f'-rank-{self.rank}'
      ),
      ours=OURS,
      columns=COLUMNS,
      settings={
        'data': ' '.join(self.sources),
        'method': self.method,
        'remat': self.remat,
        'batch': self.batch,
        'length': self.length,
        'rank': self.rank,
        'steps': self.steps,
        **facts,
      },
      finish=self._finish,
    )
    with doors.limits() as limits:
      doors.run(benchmark, [self._arm(title) for title in ARMS], limits)

  def _arm(self, title: str) -> Arm:
    module, data = ARMS[title]
    remat = self.remat if module == 'ours' or self.remat == 'full' else 'none'
    work = training.Work(
      method=self.method,
      remat=remat,
      batch=self.batch,
      length=self.length,
      rank=self.rank,
      alpha=2.0 * self.rank,
      steps=self.steps,
      folder=str(self.folder / 'model'),
      data=data,
    )
    return Arm(title, f'{PLACE}.{module}', dataclasses.asdict(work))

  def _finish(self, found: Rounds) -> None:
    """Says where the packed rows do not give the same loss."""
    packed = [title for title, (_, data) in ARMS.items() if data == 'packed']
    found.failures |= disagreements(
      found.records, OURS, packed, CLOSE[self.method]
    )

  def _spec(self) -> RunSpec:
    """Returns a run with these data; its base is opened by folder later."""
    c = config.default_config()
    with c.unlocked():
      c.data.train = self.sources if len(self.sources) > 1 else self.sources[0]
      c.data.max_length = self.length
      c.data.train_examples = _EXAMPLES
      c.data.eval_examples = 1
      c.train.batch_size = self.batch
      c.train.steps = self.steps + 1
    return config.resolve(c)
