"""What a run leaves for its reader: curves, samples and a summary."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jlora.checkpoints.run_folder import finite_or_none


def draw_losses(lines: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws the training and the held-out loss over steps.

  Args:
    lines: The lines of metrics.jsonl.
    path: Where the PNG goes.
  """
  train, held_out = _points(lines, 'loss'), _points(lines, 'eval_loss')
  with matplotlib.rc_context({'font.size': 11}):
    figure = Figure(figsize=(7, 4), dpi=120, layout='constrained')
    axes = figure.subplots()
    if train:
      axes.plot(*zip(*train, strict=True), lw=1, alpha=0.6, label='training')
    if held_out:
      axes.plot(
        *zip(*held_out, strict=True), lw=2, marker='o', label='held out'
      )
    axes.set(
      xlabel='step', ylabel='loss (nats a trained token)', ylim=(0, None)
    )
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format='png')


def _points(
  lines: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[int, float]]:
  """Returns (step, value) where a line has a finite value."""
  return [(x['step'], x[name]) for x in lines if x.get(name) is not None]


def samples_markdown(
  prompts: Sequence[str],
  references: Sequence[str | None],
  before: Sequence[str],
  after: Sequence[str] | None,
) -> str:
  """Returns the fixed prompts with their answers before and after training.

  Args:
    prompts: What was asked, as text.
    references: A right answer, or None where there is none.
    before: The base's answers.
    after: The tuned model's; None while training.
  """
  parts = ['# Samples\n']
  for i, prompt in enumerate(prompts):
    parts.append(f'## {i + 1}\n')
    parts.append(_quoted(prompt))
    if references[i] is not None:
      parts.append(f'- reference: {_inline(references[i])}')
    parts.append(f'- before: {_inline(before[i])}')
    if after is not None:
      parts.append(f'- after: {_inline(after[i])}')
    parts.append('')
  return '\n'.join(parts)


def _quoted(text: str) -> str:
  return '\n'.join(f'> {line}' for line in text.splitlines()) + '\n'


def _inline(text: str | None) -> str:
  return '`' + ' '.join((text or '').replace('`', "'").split()) + '`'


def to_json(fields: Mapping[str, Any]) -> str:
  """Returns a summary as JSON that people can read and compare.

  Args:
    fields: JSON values; numbers that are not finite become null.
  """
  fields = finite_or_none(fields)
  return json.dumps(fields, indent=2, sort_keys=True) + '\n'
