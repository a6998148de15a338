"""The figures of a comparison."""

import pathlib
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from jlora.comparison.numbers import PARTS, Arm

# Okabe and Ito's colors, which the color-blind can tell apart.
_ARM_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_STROKES = ('-', '-', '--')  # equal curves lie on each other
_PARTS = {
  'base': ('frozen base', '#7F8FA6'),
  'trained': ('trained weights', '#0072B2'),
  'gradients': ('gradients', '#56B4E9'),
  'optimizer': ('optimizer state', '#E69F00'),
  'scratch': ('activations, scratch', '#D9D9D9'),
}
_STYLE = {
  'font.size': 11,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
}
_UNITS = ((2e9, 1e9, 'GB'), (2e6, 1e6, 'MB'), (0, 1e3, 'kB'))


def draw_memory(arms: Sequence[Arm], path: pathlib.Path) -> None:
  """Draws the memory of a step by part, a bar an arm.

  Args:
    arms: From `read_arms`.
    path: Where the PNG goes.
  """
  top = max(max(arm.compiled_peak, arm.process_peak) for arm in arms)
  unit, name = next((u, n) for least, u, n in _UNITS if top >= least)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(
      figsize=(8, 1.4 + 0.8 * len(arms)), dpi=150, layout='constrained'
    )
    axes = figure.subplots()
    rows = range(len(arms))
    left = [0.0] * len(arms)
    for part in PARTS:
      label, color = _PARTS[part]
      widths = [arm.bytes[part] / unit for arm in arms]
      axes.barh(rows, widths, 0.62, left, label=label, color=color)
      left = [x + width for x, width in zip(left, widths, strict=True)]
    peaks = [arm.process_peak / unit for arm in arms]
    axes.plot(peaks, rows, 'D', color='black', ms=5, label='whole process')
    for row, peak in zip(rows, peaks, strict=True):
      axes.annotate(
        f'{peak:.2f}',
        (peak, row),
        xytext=(7, 0),
        textcoords='offset points',
        va='center',
      )
    axes.set(xlabel=f'memory of a training step ({name})')
    totals = [
      f'{arm.label}\n{total:.2f} {name}'
      for arm, total in zip(arms, left, strict=True)
    ]
    axes.set_yticks(rows, totals)
    axes.set_xlim(0, 1.12 * top / unit)
    axes.invert_yaxis()
    axes.grid(axis='x', color='#E5E5E5')
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
      [*handles[1:], handles[0]],  # the parts first
      [*labels[1:], labels[0]],
      loc='outside upper center',
      ncols=3,
      frameon=False,
    )
    figure.savefig(path)


def draw_losses(arms: Sequence[Arm], path: pathlib.Path) -> None:
  """Draws the held-out loss over training time, a line a run.

  Args:
    arms: From `read_arms`.
    path: Where the PNG goes.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(8, 4.2), dpi=150, layout='constrained')
    axes = figure.subplots()
    for number, arm in enumerate(arms):
      color = _ARM_COLORS[number % len(_ARM_COLORS)]
      end = f'{arm.label}, {arm.loss.text(".3f")} at the end'
      for run, curve in enumerate(arm.curves):
        axes.plot(
          *zip(*curve, strict=True),
          color=color,
          lw=2,
          ls=_STROKES[number % len(_STROKES)],
          alpha=1 if len(arm.curves) == 1 else 0.6,
          marker='o',
          ms=4,
          label=None if run else end,
        )
    axes.set(
      xlabel='time in training steps (s)',
      ylabel='held-out loss (nats a trained token)',
    )
    axes.set_xlim(0)
    _scale_losses(axes, arms)
    axes.grid(color='#E5E5E5')
    axes.legend(frameon=False)
    figure.savefig(path)


def _scale_losses(axes: Axes, arms: Sequence[Arm]) -> None:
  """Takes a logarithmic scale where losses fall far, so that ends differ."""
  losses = [loss for arm in arms for curve in arm.curves for _, loss in curve]
  if min(losses) > 0 and max(losses) / min(losses) > 3:
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter(NullFormatter())
