"""The numbers of a comparison, arm by arm, from comparison.json."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_LABELS = {'full': 'full', 'lora': 'LoRA', 'qlora': 'QLoRA'}
PARTS = ('base', 'trained', 'gradients', 'optimizer', 'scratch')


@dataclasses.dataclass(frozen=True)
class Spread:
  """A number over seeds.

  Attributes:
    mean: Over all seeds.
    deviation: The sample's standard deviation; None for one seed.
  """

  mean: float
  deviation: float | None

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Spread':
    """Returns the spread of one or more values."""
    several = len(values) > 1
    return cls(
      statistics.fmean(values), statistics.stdev(values) if several else None
    )

  def text(self, form: str) -> str:
    """Returns `mean ± deviation`, each in a format such as '.3f'."""
    text = format(self.mean, form)
    if self.deviation is not None:
      text += f' ± {format(self.deviation, form)}'
    return text


@dataclasses.dataclass(frozen=True)
class Arm:
  """What an arm took and gave.

  Attributes:
    name: In the config.
    label: For readers.
    kind: 'full', 'lora' or 'qlora'.
    learning_rate: Its peak.
    trained_params: Parameters that are trained.
    bytes: By part of `PARTS`; they add up to `compiled_peak`. What is no
      gradient and neither argument nor result of a step is scratch.
    compiled_peak: Bytes of a step, from the compiler.
    process_peak: Bytes, the largest of its processes.
    flops: Of a step; None where they were not counted.
    step_seconds: Median over steps, each process without its first.
    loss_before: Held-out loss of the base as this arm stores it.
    loss: Held-out loss after training.
    answers: Scores before and after by name, `exact_match` and `well_formed`;
      empty for data without a verifier.
    scored: Answers of a run behind them; all seeds answer the same prompts.
    skipped: Updates that were not finite and so not applied, over all seeds.
    file_bytes: Of the weights that a run leaves.
    curves: A run each: seconds of training and held-out loss.
  """

  name: str
  label: str
  kind: str
  learning_rate: float
  trained_params: int
  bytes: dict[str, int]
  compiled_peak: int
  process_peak: int
  flops: float | None
  step_seconds: float
  loss_before: Spread
  loss: Spread
  answers: dict[str, tuple[Spread, Spread]]
  scored: int
  skipped: int
  file_bytes: int
  curves: list[list[tuple[float, float]]]


def read_arms(record: Mapping[str, Any]) -> list[Arm]:
  """Returns the arms of a comparison, in its order.

  Args:
    record: What comparison.json holds.
  """
  return [_arm(name, record) for name in record['order']]


def _arm(name: str, record: Mapping[str, Any]) -> Arm:
  arm = record['arms'][name]
  runs = arm['runs']
  first = runs[0]
  peak = max(run['compiled_peak_bytes'] for run in runs)
  rate = {**record['shared'], **arm['fields']}['optim.learning_rate']
  return Arm(
    name=name,
    label=_LABELS.get(name, name),
    kind=arm['kind'],
    learning_rate=rate,
    trained_params=first['trainable_params'],
    bytes=_parts(first['bytes'], peak),
    compiled_peak=peak,
    process_peak=max(run['process_peak_bytes'] for run in runs),
    flops=arm['flops'],
    step_seconds=_median(arm['timing'] or [r['step_seconds'] for r in runs]),
    loss_before=Spread.of([r['base_model']['eval_loss'] for r in runs]),
    loss=Spread.of([r['tuned_model']['eval_loss'] for r in runs]),
    answers={
      score: tuple(
        Spread.of([run[when][score] for run in runs])
        for when in ('base_model', 'tuned_model')
      )
      for score in ('exact_match', 'well_formed')
      if score in first['tuned_model']
    },
    scored=first['tuned_model'].get('scored', 0),
    skipped=sum(run['skipped_updates'] for run in runs),
    file_bytes=first['file_bytes'],
    curves=[[(p['seconds'], p['loss']) for p in r['held_out']] for r in runs],
  )


def _parts(parts: Mapping[str, int], peak: int) -> dict[str, int]:
  known = {part: parts[part] for part in PARTS[:-1]}
  return {**known, 'scratch': max(peak - sum(known.values()), 0)}


def _median(processes: Sequence[Sequence[float]]) -> float:
  """Returns the median step; a process's first step also warms up."""
  return statistics.median(
    x for steps in processes for x in (steps[1:] or steps)
  )


def loss_tolerance(one: Arm, other: Arm) -> float:
  """Returns the difference of two arms' losses that counts as none, in nats.

  Two standard deviations over seeds, and 0.02 nats at least.

  Args:
    one: An arm.
    other: Another.
  """
  deviations = [x.loss.deviation or 0.0 for x in (one, other)]
  return max(0.02, 2 * max(deviations))


def sampling_error(arms: Sequence[Arm]) -> float:
  """Returns how far two arms' exact match may lie apart by chance.

  Two standard errors of the difference of two shares, at the arms' mean share
  and with a run's number of answers.

  Args:
    arms: Arms with scored answers.
  """
  share = statistics.fmean(arm.answers['exact_match'][1].mean for arm in arms)
  return 2 * math.sqrt(2 * share * (1 - share) / arms[0].scored)
