"""How the memory of a step grows with the length of its rows."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure

from jlora.parallel.machines import GIB
from jlora.planning.estimate import Estimate
from jlora.planning.planner import Planner
from jlora.planning.search import Found, longest_rows, with_length
from jlora.training.run_spec import RunSpec

_SHORTEST = 256  # tokens
# Okabe and Ito's colors, which the color-blind can tell apart.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')


@dataclasses.dataclass(frozen=True)
class Sweep:
  """One machine's part of a sweep.

  Attributes:
    estimates: By tokens a row, up to the first that does not fit.
    longest: Tokens of the longest rows that fit; None where none was sought.
  """

  estimates: dict[int, Estimate]
  longest: Found | None

  @property
  def name(self) -> str:
    """The machine's."""
    return next(iter(self.estimates.values())).machine.name


def sweep_lengths(planner: Planner, spec: RunSpec) -> Sweep:
  """Returns estimates for rows that double in length until they do not fit.

  Args:
    planner: Of the base and the machine.
    spec: From `Planner.prepare`.
  """
  estimates = {}
  length = min(_SHORTEST, planner.config.max_positions)
  while length <= planner.config.max_positions:
    estimates[length] = planner.estimate(with_length(spec, length))
    if not estimates[length].fits:
      break
    length *= 2
  longest = None
  if len(estimates) > 1 and not list(estimates.values())[-1].fits:
    longest = longest_rows(planner, with_length(spec, length // 2))
  return Sweep(estimates, longest)


def table(sweeps: Sequence[Sweep]) -> Iterator[tuple[str, ...]]:
  """Yields the lines of a table, its head first.

  Args:
    sweeps: One a machine.
  """
  yield 'target', 'tokens a row', 'peak GiB', 'usable GiB', 'fits', 'longest'
  for sweep in sweeps:
    for length, estimate in sweep.estimates.items():
      peak = f'{estimate.peak / GIB:.2f}'
      yield (
        sweep.name,
        f'{length}',
        peak if estimate.compiled else f'{peak} (counted)',
        f'{estimate.machine.usable / GIB:.2f}',
        'yes' if estimate.fits else 'no',
        f'{sweep.longest}' if sweep.longest else '',
      )


def draw(sweeps: Sequence[Sweep], path: pathlib.Path) -> None:
  """Draws peaks over the length of rows, and what each machine has.

  Args:
    sweeps: One a machine.
    path: Where the PNG goes.
  """
  with matplotlib.rc_context({'font.size': 11}):
    figure = Figure(figsize=(7, 4.4), dpi=150, layout='constrained')
    axes = figure.subplots()
    for i, sweep in enumerate(sweeps):
      color = _COLORS[i % len(_COLORS)]
      peaks = [e.peak / GIB for e in sweep.estimates.values()]
      axes.plot(list(sweep.estimates), peaks, 'o-', color=color)
      usable = next(iter(sweep.estimates.values())).machine.usable / GIB
      label = f'{sweep.name}, of {usable:.1f} GiB'
      axes.axhline(usable, color=color, ls='--', lw=1, label=label)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.set(
      xlabel='tokens a row', ylabel='peak of a device (GiB)', ylim=(0, None)
    )
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format='png')
