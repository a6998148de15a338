"""What to change in a run that does not fit, each tried and measured."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jlora.core.quantization import QuantSpec
from jlora.models import families
from jlora.parallel.machines import Machine, find_machine
from jlora.planning.estimate import Estimate
from jlora.planning.planner import Planner, mesh_flags, shared
from jlora.planning.search import with_rows
from jlora.training.run_spec import RunSpec

_SMALL_CHUNK = 64  # tokens whose logits exist at once
_MORE = (2, 4, 8)  # times as many devices


class Change(NamedTuple):
  """One thing that was tried.

  Attributes:
    flags: What to add to the command.
    estimate: What a step takes then.
  """

  flags: str
  estimate: Estimate


def advise(planner: Planner, spec: RunSpec) -> Iterator[Change]:
  """Yields changes, alone, then together, then with more devices.

  It ends with the first step of these three in which something fits.

  Args:
    planner: Of the base and the machine.
    spec: From `Planner.prepare`; it does not fit.
  """
  changes = list(_changes(planner, spec))
  found = False
  for flags, change in changes:
    estimate = planner.estimate(change(spec))
    found |= estimate.fits
    yield Change(flags, estimate)
  if found:
    return
  together = spec
  for _, change in changes:
    together = change(together)
  flags = ' '.join(flags for flags, _ in changes)
  if len(changes) > 1:
    estimate = planner.estimate(together)
    yield Change(flags, estimate)
    if estimate.fits:
      return
  yield from _more_devices(planner, together, flags)


def _changes(
  planner: Planner, spec: RunSpec
) -> Iterator[tuple[str, Callable[[RunSpec], RunSpec]]]:
  """Yields flags and what they do, those that cost least first."""
  train, devices = spec.train, planner.row_devices(spec)
  if spec.optim.moment_bits != 8:
    yield '--config.optim.moment_bits=8', _setting('optim', moment_bits=8)
  if not spec.optim.offload and planner.machine.platform != 'cpu':
    yield '--config.optim.offload=True', _setting('optim', offload=True)
  if train.remat != 'full':
    yield '--config.train.remat=full', _setting('train', remat='full')
  if train.loss_chunk > _SMALL_CHUNK:
    flag = f'--config.train.loss_chunk={_SMALL_CHUNK}'
    yield flag, _setting('train', loss_chunk=_SMALL_CHUNK)
  if train.batch_size // train.accumulate > devices:
    count = train.batch_size // devices
    flag = f'--config.train.accumulate={count}'
    yield flag, _setting('train', accumulate=count)
  if spec.quant is None and spec.is_adapter:
    quant = families.resolve(QuantSpec(), planner.config)
    yield (
      '(start from experiments/qlora.py)',
      lambda spec: dataclasses.replace(spec, quant=quant),
    )
  whole = spec.mesh.sizes[1:] == (1, 1)
  if whole and planner.machine.devices > 1:
    mesh = shared(spec.mesh, planner.machine.devices)
    flags = mesh_flags(mesh.fsdp)
    yield flags, lambda spec: dataclasses.replace(spec, mesh=mesh)


def _setting(section: str, **fields: Any) -> Callable[[RunSpec], RunSpec]:
  """Returns what sets fields of one section."""

  def change(spec: RunSpec) -> RunSpec:
    new = dataclasses.replace(getattr(spec, section), **fields)
    return dataclasses.replace(spec, **{section: new})

  return change


def _more_devices(
  planner: Planner, spec: RunSpec, flags: str
) -> Iterator[Change]:
  """Yields the same on more devices, which share the parameters."""
  if planner.machine.platform == 'cpu':
    return
  rows = spec.train.rows(planner.row_devices(spec))
  for factor in _MORE:
    machine = _larger(planner.machine, factor)
    if machine is None:
      continue
    mesh = shared(spec.mesh, machine.devices)
    wider = dataclasses.replace(spec, mesh=mesh)
    wider = with_rows(wider, rows * machine.devices)
    size = wider.train.batch_size
    estimate = Planner(planner.config, machine).estimate(wider)
    yield Change(
      f'{flags} --target={machine.name} --config.train.batch_size={size}'
      f' {mesh_flags(machine.devices)}'.lstrip(),
      estimate,
    )
    if estimate.fits:
      return


def _larger(machine: Machine, factor: int) -> Machine | None:
  """Returns a machine of the same kind with more devices, if one is made."""
  name = machine.name
  if name.endswith(f'-{machine.devices}'):
    name = name.rpartition('-')[0]
  try:
    return find_machine(f'{name}-{machine.devices * factor}')
  except ValueError:
    return None
