"""The arms of `train_step.py`, and what each is asked for."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.benchmarks.harness import doors, rounds, sizes, training
from experiments.benchmarks.harness.agreement import disagreements
from experiments.benchmarks.harness.models import Model
from experiments.benchmarks.harness.processes import Arm, Limits
from experiments.benchmarks.harness.results import Column
from experiments.benchmarks.harness.rounds import Rounds
from jlora.errors import ConfigError
from jlora.models.config import DecoderConfig

OURS = 'jlora'
DENSE = 'lora'  # ours, whatever --method says
ARMS = {  # by name: the policies that each has; the fastest is looked for
  OURS: ('none', 'dots', 'full'),
  DENSE: ('none', 'dots', 'full'),
  'bare': ('none', 'dots', 'full'),
  'peft': ('none', 'full'),
  'qwix': ('none', 'dots', 'full'),
}
_OTHERS = [name for name in ARMS if name != OURS]
PEERS = (  # such as qwix, at its fastest, and qwix:none
  *_OTHERS,
  *(f'{name}:{remat}' for name in _OTHERS for remat in ARMS[name]),
)
DOUBLES = ('batch', 'length', 'layers', 'vocab_size')
COLUMNS = (
  Column('remat', 'remat'),
  Column('step_s', 's a step', digits=2),
  Column('tokens_per_s', 'tokens/s', digits=0),
  Column('share', '% of matmul rate', 0.01, 0),
  Column('peak_bytes', 'process peak, GiB', 2**30, 2),
  Column('compiled_bytes', 'compiled peak, GiB', 2**30, 2),
  Column('temp_bytes', 'temp, GiB', 2**30, 2),
  Column('cold_compile_s', 'trace and compile, s', digits=1),
  Column('warm_compile_s', 'with cache, s', digits=1),
  Column('flops', 'TFLOP', 1e12, 2),
  Column('loss', 'first loss', digits=4),
)
TRIAL_STEPS = 2
PLACE = 'experiments.benchmarks.arms'
# How far first losses may lie from ours, as a share: scales are quantized
# differently, or not at all.
CLOSE = {'lora': 1e-4, 'qlora': 1e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
  """Ours and its peers at one size.

  Attributes:
    folder: For weights and tokens.
    model: Whose weights.
    label: What the model is called.
    peers: Of `PEERS`.
    doubled: Of `DOUBLES`: ours is also run with twice of each.
    method: As in `training.Work`.
    remat: Likewise, or 'best'.
    batch: Likewise.
    length: Likewise.
    rank: Likewise.
    steps: Likewise.
  """

  folder: pathlib.Path
  model: Model
  label: str
  peers: tuple[str, ...]
  doubled: tuple[str, ...]
  method: str
  remat: str
  batch: int
  length: int
  rank: int
  steps: int

  def run(self) -> None:
    """Writes weights and tokens, runs the arms and writes the result.

    Raises:
      JloraError: See `doors.run`.
    """
    self._check_policies()
    config = self._write(self.model, 'model')
    benchmark = self._benchmark(config)
    with doors.limits() as limits:
      tried, arms = self._choose(benchmark.earlier, limits)
      arms += self._doubles(config, arms[0].work['remat'])
      work = {'rows': self.batch * self.length}
      work['kernels'] = list(sizes.kernels(config))
      arms.append(Arm('matmul', f'{PLACE}.matmul', work))
      doors.run(dataclasses.replace(benchmark, tried=tried), arms, limits)

  def _write(self, model: Model, name: str) -> DecoderConfig:
    """Writes weights and tokens into a folder, and returns the sizes."""
    config = model.write(self.folder / name)
    training.write_tokens(self.folder / name, config.vocab_size)
    return config

  def _check_policies(self) -> None:
    for peer in self.peers:
      name, own = _arm_and_policy(peer)
      if not own and self.remat not in ('best', *ARMS[name]):
        raise ConfigError(
          f'--remat is {self.remat}, and {name} has {", ".join(ARMS[name])}'
          f' only; use --remat=best, or leave out --peer={name}'
        )

  def _benchmark(self, config: DecoderConfig) -> doors.Benchmark:
    doubled = ''.join(f'-double-{name}' for name in self.doubled)
    return doors.Benchmark(
      name='train_step',
      file=(
        f'train_step-{self.label}-{self.method}-{self.remat}-{self.batch}x'
        f'{self.length}-rank-{self.rank}{doubled}'
      ),
      ours=OURS,
      columns=COLUMNS,
      settings={
        'model': self.label,
        'method': self.method,
        'remat': self.remat,
        'batch': self.batch,
        'length': self.length,
        'rank': self.rank,
        'steps': self.steps,
      },
      finish=functools.partial(self._finish, config),
    )

  def arm(self, name: str, remat: str, title: str = '', **changes: Any) -> Arm:
    """Returns an arm.

    Args:
      name: In `ARMS`.
      remat: Its policy.
      title: What tables call it; '' for its name.
      **changes: Fields of `training.Work` that differ.
    """
    module = 'ours' if name in (OURS, DENSE) else name
    work = training.Work(
      method=DENSE if name == DENSE else self.method,
      remat=remat,
      rank=self.rank,
      alpha=2.0 * self.rank,
      **{
        'batch': self.batch,
        'length': self.length,
        'steps': self.steps,
        'folder': str(self.folder / 'model'),
        **changes,
      },
    )
    return Arm(title or name, f'{PLACE}.{module}', dataclasses.asdict(work))

  def _choose(
    self, earlier: dict[str, Any], limits: Limits
  ) -> tuple[dict[str, float], list[Arm]]:
    """Returns the speeds that were tried, and an arm of each peer and ours."""
    tried, arms = {}, []
    for peer in (OURS, *self.peers):
      name, own = _arm_and_policy(peer)
      remat = own or earlier.get(name, {}).get('remat', self.remat)
      if remat == 'best':
        found = self._try(name, limits)
        tried |= found
        # If none has run, the first one will say why.
        best = max(found, key=found.get, default=f'{name} {ARMS[name][0]}')
        remat = best.removeprefix(f'{name} ')
      arms.append(self.arm(name, remat, peer))
    return tried, arms

  def _try(self, name: str, limits: Limits) -> dict[str, float]:
    """Returns tokens/s of all policies of an arm."""
    arms = [
      self.arm(name, remat, f'{name} {remat}', steps=TRIAL_STEPS)
      for remat in ARMS[name]
    ]
    found = rounds.take_turns(arms, 1, limits, doors.say)
    return {r['arm']: r['tokens_per_s'] for r in found.records}

  def _doubles(self, config: DecoderConfig, remat: str) -> Iterator[Arm]:
    """Yields ours with twice of what is to be doubled."""
    for name in self.doubled:
      title = f'{OURS}, {name} ×2'
      if name in ('batch', 'length'):
        yield self.arm(OURS, remat, title, **{name: 2 * getattr(self, name)})
        continue
      larger = {name: 2 * getattr(config, name)}
      self._write(Model(None, dataclasses.replace(config, **larger)), name)
      yield self.arm(OURS, remat, title, folder=str(self.folder / name))

  def _finish(self, config: DecoderConfig, found: Rounds) -> None:
    """Adds shares of the matmul rate, and says which losses differ."""
    needed = sizes.model_flops(config, self.batch, self.length, self.rank)
    rates = {
      record['round']: record['flops_per_s']
      for record in found.records
      if record['arm'] == 'matmul'
    }
    for record in found.records:
      rate = rates.get(record['round'])
      if record['arm'] in (OURS, *PEERS) and rate:
        record['share'] = needed / record['step_s'] / rate
    close = CLOSE[self.method]
    same = [peer for peer in PEERS if _arm_and_policy(peer)[0] != DENSE]
    found.failures |= disagreements(found.records, OURS, same, close)


def _arm_and_policy(peer: str) -> tuple[str, str]:
  """Returns the arm of a peer, and the policy that it is held to or ''."""
  name, _, remat = peer.partition(':')
  return name, remat
