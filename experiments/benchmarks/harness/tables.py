"""Results as Markdown, and the part of README.md that is made of them."""

import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.benchmarks.harness.results import RATE, Result, load

FOLDER = pathlib.Path(__file__).parents[1]
RESULTS = FOLDER / 'results'
README = FOLDER / 'README.md'
BEGIN = '<!-- results: written by `train_step.py --render` -->'
END = '<!-- end of results -->'
_RATIOS = (  # key, title of the column; of our figure over the arm's
  ('speed', 'jlora’s speed'),
  ('peak', 'jlora’s peak'),
  ('temp', 'jlora’s temp'),
)


def table(result: Result) -> str:
  """Returns a table with one row an arm, under a line that says what it is.

  Args:
    result: From `results`.
  """
  arms = {
    arm: figures
    for arm, figures in result['summary'].items()
    if RATE in figures
  }
  columns = [
    column
    for column in result['columns']
    if any(figures.get(column['key']) is not None for figures in arms.values())
  ]
  ratios = [
    (key, title)
    for key, title in _RATIOS
    if any(key in figures for figures in arms.values())
  ]
  titles = ['', *(c['title'] for c in columns), *(title for _, title in ratios)]
  lines = [_row(titles), _row(['---', *['---:'] * (len(titles) - 1)])]
  for arm, figures in arms.items():
    cells = [_cell(figures.get(c['key']), c) for c in columns]
    cells += [_ratio(figures.get(key)) for key, _ in ratios]
    lines.append(_row([arm, *cells]))
  return '\n'.join([*_caption(result), '', *lines, *_missing(result)])


def _row(cells: list[str]) -> str:
  return f'| {" | ".join(cells)} |'


def _cell(value: Any, column: dict[str, Any]) -> str:
  if value is None:
    return '–'
  if isinstance(value, str):
    return value
  return f'{value / column["scale"]:,.{column["digits"]}f}'


def _ratio(value: float | None) -> str:
  return '' if value is None else f'{value:.2f} ×'


def _caption(result: Result) -> Iterator[str]:
  """Yields what was measured, and where."""
  settings = ', '.join(f'{k} {v}' for k, v in result['settings'].items())
  machine = result['machine']
  versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
  count = len({record['round'] for record in result['records']})
  where = f'{machine["processor"]}, {machine["threads"]} threads'
  yield f'**{result["benchmark"]}**: {settings}.'
  yield ''
  yield (
    f'{count} round{"s" * (count > 1)} on {where}; {versions}; commit'
    f' `{result["commit"]}`, {result["date"]}.{_matmul(result)}'
  )
  if result['tried']:
    tried = (f'{k} {v:,.0f}' for k, v in result['tried'].items())
    yield ''
    yield f'Tried before, tokens/s: {", ".join(tried)}.'


def _matmul(result: Result) -> str:
  rate = result['summary'].get('matmul', {}).get('flops_per_s')
  if not rate:
    return ''
  return f' Matrix products alone reach {rate / 1e9:.0f} GFLOP/s here.'


def _missing(result: Result) -> Iterator[str]:
  for sentence in result['failures'].values():
    yield ''
    yield sentence


def render(folder: pathlib.Path = RESULTS) -> str:
  """Returns the tables of all results, in the order of their files' names.

  Args:
    folder: Where the files lie.
  """
  return '\n\n'.join(
    table(load(path)) for path in sorted(folder.glob('*.json'))
  )


def rewritten(text: str, tables: str) -> str:
  """Returns a page with new tables between its two marks.

  Args:
    text: The page.
    tables: From `render`.
  """
  before, _, rest = text.partition(BEGIN)
  _, _, after = rest.partition(END)
  return f'{before}{BEGIN}\n\n{tables or "None yet."}\n\n{END}{after}'
