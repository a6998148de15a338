"""What a plan says: on the console, and in files."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from jlora.parallel.machines import GIB
from jlora.planning.advice import advise
from jlora.planning.estimate import Estimate
from jlora.planning.planner import Planner, mesh_flags
from jlora.planning.search import Found, largest_rows
from jlora.planning.sweep import Sweep, draw, sweep_lengths, table
from jlora.training.run_spec import RunSpec

Row = tuple[str, ...]


def plan(
  planners: Sequence[Planner],
  spec: RunSpec,
  console: Console,
  *,
  search: bool = True,
  out: pathlib.Path | None = None,
) -> None:
  """Prints what a run takes on machines, and what to change where it must.

  Args:
    planners: One a machine.
    spec: The resolved config.
    console: Where it is told.
    search: Whether to find the largest microbatch, and changes that help.
    out: Folder for plan.md and plan.json; None writes none.

  Raises:
    ConfigError: The run fits neither the base nor the devices.
  """
  records, lines = [], []
  for planner in planners:
    ready = planner.prepare(spec)
    _introduce(planner, spec, ready, console)
    estimate = planner.estimate(ready)
    flops = planner.flops(ready)
    rows = list(estimate.rows())
    rows.append(('FLOPs a step', f'{flops:.3g}, in matrix products'))
    if ready.eval.merge:
      merged = planner.merged(ready)
      rows.append(('merged for answers', estimate.answers(merged)))
    _show(console, rows)
    if search and estimate.fits:
      found = _largest(planner, ready)
      _show(console, found)
      rows += found
    elif search:
      rows += _advise(planner, ready, console)
    records.append(_record(estimate, ready, rows) | {'flops': flops})
    lines += [(planner.machine.name, *row) for row in rows]
  if out is not None:
    head = ('target', 'what', 'value')
    _write(out, 'plan', records, [head, *lines])
    console.print(f'wrote {out}/plan.md and plan.json')


def plan_sweep(
  planners: Sequence[Planner],
  spec: RunSpec,
  console: Console,
  out: pathlib.Path,
) -> None:
  """Prints and draws the memory of a step by the length of its rows.

  Args:
    planners: One a machine.
    spec: The resolved config.
    console: Where it is told.
    out: Folder for sweep.md, sweep.json and sweep.png.

  Raises:
    ConfigError: The run fits neither the base nor the devices.
  """
  sweeps = []
  for planner in planners:
    ready = planner.prepare(spec)
    _introduce(planner, spec, ready, console)
    sweeps.append(sweep_lengths(planner, ready))
  lines = list(table(sweeps))
  for line in lines:
    console.print('  ' + ''.join(f'{cell:<18}' for cell in line).rstrip())
  _write(out, 'sweep', [_swept(sweep) for sweep in sweeps], lines)
  draw(sweeps, out / 'sweep.png')
  console.print(f'wrote {out}/sweep.md, sweep.json and sweep.png')


def _show(console: Console, rows: Iterable[Row]) -> None:
  for name, value in rows:
    console.print(f'  {name:<22} {value}')


def markdown(lines: Iterable[Row]) -> str:
  """Returns a Markdown table.

  Args:
    lines: Its head, then its rows.
  """
  head, *rows = lines
  rule = tuple('---' for _ in head)
  return ''.join(f'| {" | ".join(row)} |\n' for row in (head, rule, *rows))


def _introduce(
  planner: Planner, spec: RunSpec, ready: RunSpec, console: Console
) -> None:
  """Prints the machine, the mesh where it was chosen, and what is missing."""
  console.print(planner.machine.describe())
  if ready.mesh != spec.mesh:
    console.print(
      f'  mesh: all {planner.machine.devices} devices share rows and'
      f' parameters; train with {mesh_flags(planner.machine.devices)}'
    )
  if planner.missing:
    console.print(f'  counted, not compiled: {planner.missing}')


def _largest(planner: Planner, spec: RunSpec) -> list[Row]:
  found = largest_rows(planner, spec)
  devices = planner.row_devices(spec)
  text = f'{found} rows of {spec.data.max_length} tokens'
  if devices > 1:
    text += f' on each of {devices} devices'
  return [('largest microbatch', text)]


def _advise(planner: Planner, spec: RunSpec, console: Console) -> list[Row]:
  """Prints what was tried, as it comes."""
  rows = []
  console.print('  tried instead:')
  for change in advise(planner, spec):
    peak = f'{change.estimate.peak / GIB:.2f} GiB'
    value = f'{change.flags}: {peak}, {change.estimate.verdict()}'
    console.print(f'    {value}')
    rows.append(('tried', value))
  return rows


def _record(
  estimate: Estimate, spec: RunSpec, rows: Iterable[Row]
) -> dict[str, Any]:
  return {
    'target': estimate.machine.name,
    'compiled_for': estimate.machine.kind or estimate.machine.platform,
    'relative': estimate.machine.relative,
    'compiled': estimate.compiled,
    'bytes': estimate.parts,
    'peak': estimate.peak,
    'usable': estimate.machine.usable,
    'fits': estimate.fits,
    'moved': estimate.moved,
    'written': estimate.written,
    'config': json.loads(spec.to_json()),
    'said': [list(row) for row in rows],
  }


def _swept(sweep: Sweep) -> dict[str, Any]:
  longest: Found | None = sweep.longest
  return {
    'target': sweep.name,
    'longest': longest and longest.size,
    'exact': longest and longest.exact,
    'peaks': {str(n): e.peak for n, e in sweep.estimates.items()},
    'compiled': all(e.compiled for e in sweep.estimates.values()),
  }


def _write(
  out: pathlib.Path, name: str, records: Any, lines: Sequence[Row]
) -> None:
  out.mkdir(parents=True, exist_ok=True)
  (out / f'{name}.md').write_text(markdown(lines))
  text = json.dumps(records, indent=2, sort_keys=True) + '\n'
  (out / f'{name}.json').write_text(text)
