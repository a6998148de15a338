"""report.md: the table of a comparison and what it means.

Everything in it comes from comparison.json.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jlora.comparison.figures import draw_losses, draw_memory
from jlora.comparison.numbers import Arm, read_arms
from jlora.comparison.words import answer, listed, size

# Sources: "Memory and training speed" in torchtune's README (rows packed to
# 2,048 tokens, two at a time, compiled); PEFT's method comparison.
_HIDDEN = """\
A CPU hides what QLoRA's dequantization costs: beside its slow matrix products
the look-up is cheap. On GPUs it is not. Published figures:"""
_ON_GPUS = """\
| Llama-3.1-8B on an RTX 4090 (torchtune) | full | LoRA | QLoRA |
| --- | ---: | ---: | ---: |
| tokens a second | 1,650 | 3,083 | 2,413 |
| peak memory | 18.9 GiB | 16.2 GiB | 7.4 GiB |

There QLoRA trains 22 % fewer tokens a second than LoRA and takes 54 % less
memory. On Llama-3.2-3B and MetaMathQA (PEFT's method comparison), full
fine-tuning reached 47.2 % in 2,147 s and 36.2 GiB, and LoRA of rank 32 47.8 %
in 942 s and 20.8 GiB."""


def write_report(folder: os.PathLike[str] | str) -> str:
  """Writes report.md, memory.png and loss.png from comparison.json.

  Args:
    folder: Of the comparison.

  Returns:
    The table, as in report.md.
  """
  root = pathlib.Path(folder)
  record = json.loads((root / 'comparison.json').read_text())
  arms = read_arms(record)
  draw_memory(arms, root / 'memory.png')
  draw_losses(arms, root / 'loss.png')
  (root / 'report.md').write_text(markdown(record))
  return table(arms, record['parameters'])


def markdown(record: Mapping[str, Any]) -> str:
  """Returns the report.

  Args:
    record: What comparison.json holds.
  """
  arms = read_arms(record)
  sections = [
    f'# Fine-tuning compared: {listed([arm.label for arm in arms])}',
    _setting(arms, record),
    table(arms, record['parameters']),
    _notes(arms, record),
    '![Memory of a step by part](memory.png)',
    '![Held-out loss over training time](loss.png)',
    '## When to use which',
    *answer(arms, record),
    '## On GPUs',
    _HIDDEN if record['versions']['backend'] == 'cpu' else 'Published figures:',
    _ON_GPUS,
    '## How it was made',
    _differences(arms, record),
    _grid(arms, record),
    _origin(record),
  ]
  return '\n\n'.join(section for section in sections if section) + '\n'


def table(arms: Sequence[Arm], parameters: int) -> str:
  """Returns the comparison as a Markdown table, a column an arm.

  Args:
    arms: From `read_arms`.
    parameters: Of the base.
  """
  rows = [['', *(arm.label for arm in arms)], ['---', *['---:'] * len(arms)]]
  for name, cell in _rows(arms, parameters):
    rows.append([name, *(cell(arm) for arm in arms)])
  return '\n'.join(_row(row) for row in rows)


def _row(cells: Iterable[str]) -> str:
  return f'| {" | ".join(cells)} |'


def _rows(
  arms: Sequence[Arm], parameters: int
) -> Iterable[tuple[str, Callable[[Arm], str]]]:
  """Yields the name of each row and what makes its cells."""
  first = arms[0]
  yield 'learning rate', lambda a: f'{a.learning_rate:.3g}'
  yield (
    'trained parameters',
    lambda a: f'{a.trained_params:,} ({a.trained_params / parameters:.1%})',
  )
  yield 'frozen base', lambda a: size(a.bytes['base'])
  yield 'trained weights', lambda a: size(a.bytes['trained'])
  yield 'gradients', lambda a: size(a.bytes['gradients'])
  yield 'optimizer state', lambda a: size(a.bytes['optimizer'])
  yield '**peak of a step**, compiled', lambda a: size(a.compiled_peak)
  yield 'peak of the process', lambda a: size(a.process_peak)
  if all(arm.flops for arm in arms):
    yield (
      'GFLOPs a step',
      lambda a: f'{_rounded(a.flops / 1e9)} ({a.flops / first.flops:.2f}×)',
    )
  yield (
    '**time a step**, median',
    lambda a: (
      f'{a.step_seconds:.3g} s ({a.step_seconds / first.step_seconds:.2f}×)'
    ),
  )
  yield 'held-out loss before', lambda a: a.loss_before.text('.3f')
  yield '**held-out loss** after', lambda a: a.loss.text('.3f')
  for score, name in (
    ('exact_match', '**exact match**'),
    ('well_formed', 'well-formed answers'),
  ):
    if all(score in arm.answers for arm in arms):
      yield name, lambda a, score=score: _change(a, score)
  yield 'file of the result', lambda a: size(a.file_bytes)


def _rounded(value: float) -> str:
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _change(arm: Arm, score: str) -> str:
  before, after = arm.answers[score]
  return f'{before.mean:.0%} → {after.text(".0%")}'


def _setting(arms: Sequence[Arm], record: Mapping[str, Any]) -> str:
  shared = record['shared']
  runs = record['arms'][arms[0].name]['runs']
  machine, versions = record['machine'], record['versions']
  return (
    f'{record["base"]}. Each arm makes {runs[0]["steps"]} updates of'
    f' {shared["train.batch_size"]} rows of {shared["data.max_length"]} tokens'
    f' from `{shared["data.train"]}`, with the same examples in the same order'
    f' and {_seeds(runs)}, each run in a process of its own.'
    f' Measured on {machine["cores"]} cores of a'
    f' machine with {size(machine["memory_bytes"])} of memory, backend'
    f' {versions["backend"]}.'
  )


def _seeds(runs: Sequence[Mapping[str, Any]]) -> str:
  seeds = [str(run['seed']) for run in runs]
  if len(seeds) == 1:
    return f'seed {seeds[0]}'
  return f'seeds {listed(seeds)} (mean ± standard deviation)'


def _notes(arms: Sequence[Arm], record: Mapping[str, Any]) -> str:
  timing = record['arms'][arms[0].name]['timing']
  times = (
    f'Step times come from {len(timing)} rounds in which the arms took turns,'
    ' each in a fresh process'
    if timing
    else 'Step times are those of the runs themselves, one arm after the other:'
    ' another load on the machine in between would distort their ratios'
  )
  notes = [
    'The peak of a step is what the compiler reserves: arguments, results and'
    ' scratch. The peak of the process adds the program, the tokenizer,'
    ' reading the base and answering prompts.',
    f'{times}; the first step of a process does not count.',
    'Operations are counted on the program as it is lowered, layers unrolled,'
    ' recomputation included.',
    'The loss before training is that of the base as the arm stores it, so its'
    ' difference is what quantization alone costs.',
  ]
  if not all(arm.flops for arm in arms):
    notes[2] = 'Operations are left out: this backend does not count them.'
  if any(arm.skipped for arm in arms):
    skipped = listed([f'{arm.label} {arm.skipped}' for arm in arms])
    notes.append(f'Updates that were not finite, and not applied: {skipped}.')
  return '\n'.join(f'- {note}' for note in notes)


def _differences(arms: Sequence[Arm], record: Mapping[str, Any]) -> str:
  """Returns the table of the fields that differ between the arms."""
  fields = {arm.name: record['arms'][arm.name]['fields'] for arm in arms}
  names = sorted({name for each in fields.values() for name in each})
  rows = [
    ['what differs', *(arm.label for arm in arms)],
    ['---'] * (len(arms) + 1),
  ]
  for name in names:
    values = (json.dumps(fields[arm.name].get(name)) for arm in arms)
    rows.append([f'`{name}`', *(f'`{value}`' for value in values)])
  return '\n'.join(_row(row) for row in rows)


def _grid(arms: Sequence[Arm], record: Mapping[str, Any]) -> str:
  """Returns the losses over learning rates, or nothing."""
  lines = []
  for arm in arms:
    for rate, loss in record['grid'].get(arm.name, ()):
      text = 'failed' if loss is None else f'{loss:.4f}'
      lines.append(_row([arm.label, f'{rate:.3g}', text]))
  if not lines:
    return ''
  header = ['| arm | learning rate | held-out loss |', '|---|---:|---:|']
  return '\n'.join([*header, *lines])


def _origin(record: Mapping[str, Any]) -> str:
  versions = ', '.join(
    f'{name} {version}' for name, version in sorted(record['versions'].items())
  )
  runs = next(iter(record['arms'].values()))['runs']
  digests = ', '.join(
    f'`{run["data_digest"][:16]}` (seed {run["seed"]})' for run in runs
  )
  return (
    f'```\n{record["command"]}\n```\n\nVersions: {versions}. Base sha256'
    f' `{record["base_sha256"]}`; digest of the examples {digests}. All numbers'
    ' are in `comparison.json`, from which this page was made.'
  )
