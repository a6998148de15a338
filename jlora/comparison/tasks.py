"""The runs that make a comparison."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator

from jlora.comparison.spec import ComparisonSpec, flat, flat_json
from jlora.comparison.workers import train_apart
from jlora.errors import ConfigError
from jlora.training.run_spec import LogSpec, RunSpec


@dataclasses.dataclass(frozen=True)
class Task:
  """A run of a comparison.

  Attributes:
    arm: Whose run it is.
    folder: Its run folder.
    spec: The run.
    kept: Whether what it trained is kept, beside its numbers.
  """

  arm: str
  folder: pathlib.Path
  spec: RunSpec
  kept: bool = False

  @property
  def is_done(self) -> bool:
    """Whether the run has ended."""
    return (self.folder / 'summary.json').is_file()

  def check(self) -> None:
    """Requires that an earlier run in the folder is this one.

    Raises:
      ConfigError: It is another.
    """
    path = self.folder / 'config.json'
    if not path.is_file():
      return
    old, new = flat_json(path.read_text()), flat(self.spec)
    for field in sorted(old.keys() | new.keys()):
      if old.get(field) != new.get(field):
        raise ConfigError(
          f'{self.folder} holds a run with {field}={old.get(field)!r}, and this'
          f' comparison has {new.get(field)!r}; choose another --workdir, or'
          ' remove the folder to run it again'
        )

  def run(self) -> bool:
    """Runs it unless it is done, and drops what is not kept.

    Returns:
      False where a signal stopped it.
    """
    if self.is_done:
      return True
    if not train_apart(self.spec, self.folder):
      return False
    dropped = ('checkpoints',)  # three copies of what was trained
    if not self.kept:
      dropped += ('adapter', 'best', 'model')
    for name in dropped:
      shutil.rmtree(self.folder / name, ignore_errors=True)
    return True


def runs(spec: ComparisonSpec, root: pathlib.Path) -> Iterator[Task]:
  """Yields a run for each seed and arm.

  Args:
    spec: The comparison.
    root: Its folder.
  """
  for seed in spec.seeds:
    for arm, run in spec.arms.items():
      folder = root / f'{arm}-seed{seed}'
      yield Task(arm, folder, _logged(run, seed), kept=True)


def timing(spec: ComparisonSpec, root: pathlib.Path) -> Iterator[Task]:
  """Yields short runs in which the arms take turns.

  Args:
    spec: The comparison.
    root: Its folder.
  """
  for number in range(spec.timing_rounds):
    for arm, run in spec.arms.items():
      folder = root / 'timing' / f'{arm}-round{number}'
      short = dataclasses.replace(
        _logged(run, spec.seeds[0]),
        data=dataclasses.replace(run.data, eval_examples=1),
        eval=dataclasses.replace(
          run.eval, every=spec.timing_steps, examples=0, samples=1
        ),
        train=dataclasses.replace(
          run.train,
          steps=spec.timing_steps,
          epochs=None,
          checkpoint_every=spec.timing_steps,
        ),
      )
      yield Task(arm, folder, short)


def searches(spec: ComparisonSpec, root: pathlib.Path) -> Iterator[Task]:
  """Yields a run for each arm and each learning rate of the grid.

  Args:
    spec: The comparison.
    root: Its folder.
  """
  for factor in spec.grid:
    for arm, run in spec.arms.items():
      rate = run.optim.learning_rate * factor
      folder = root / 'grid' / f'{arm}-{rate:.3g}'
      run = with_rate(_logged(run, spec.seeds[0]), rate)
      quiet = dataclasses.replace(run.eval, examples=0, samples=1)
      yield Task(arm, folder, dataclasses.replace(run, eval=quiet))


def _logged(run: RunSpec, seed: int) -> RunSpec:
  """Returns the run with a seed, and with every step in its metrics."""
  return dataclasses.replace(run, seed=seed, log=LogSpec(every=1))


def with_rate(run: RunSpec, rate: float) -> RunSpec:
  """Returns the run at another learning rate."""
  optim = dataclasses.replace(run.optim, learning_rate=rate)
  return dataclasses.replace(run, optim=optim)
