"""Compiles the step of a run for a machine, or counts where it cannot."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jlora.core.quantized import is_quantized
from jlora.errors import ConfigError, MissingCompilerError
from jlora.models.config import DecoderConfig
from jlora.parallel.devices import compute_dtype
from jlora.parallel.machines import GIB, Machine
from jlora.parallel.mesh import AXES, make_mesh, sizes
from jlora.parallel.topology import devices_of
from jlora.planning.collectives import moved_bytes
from jlora.planning.counting import count_gradients, count_scratch
from jlora.planning.estimate import Estimate
from jlora.planning.written import written_kernels
from jlora.training.footprint import ON_HOST, bytes_by_part, compiled_peak
from jlora.training.halves import Halves, abstract_halves, count_merged
from jlora.training.program import abstract_batch, make_program
from jlora.training.requirements import check_rows, resolve
from jlora.training.run_spec import MeshSpec, RunSpec
from jlora.training.traced import count_flops, count_kept

_STEPS = 1000  # of the schedule, where a run is as long as its data
_REFUSED = re.compile(
  r'(?:Used|temporaries \(|requirement of) ?([\d.]+)([KMGT]?)'
)
_UNITS = {'': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}


def shared(mesh: MeshSpec, devices: int) -> MeshSpec:
  """Returns a mesh whose devices share rows and parameters.

  Args:
    mesh: What else it keeps.
    devices: How many there are.
  """
  return dataclasses.replace(mesh, data=1, fsdp=devices, tensor=1)


def mesh_flags(devices: int) -> str:
  """Returns the flags that lay out a training run as `shared` does.

  Args:
    devices: How many there are.
  """
  return f'--config.mesh.data=1 --config.mesh.fsdp={devices}'


class Planner:
  """What runs of one base take on one machine.

  Attributes:
    config: The base's sizes.
    machine: The machine.
    missing: Why nothing is compiled; empty where it is.
    compiles: Programs compiled so far.
  """

  def __init__(self, config: DecoderConfig, machine: Machine):
    """Finds the machine's devices, and so its compiler.

    Args:
      config: The base's sizes.
      machine: From `find_machine`.

    Raises:
      ConfigError: More CPU devices were asked for than there are.
    """
    self.config, self.machine = config, machine
    self.missing, self.compiles = '', 0
    self._devices: Any = None
    try:
      self._devices = devices_of(machine)
    except MissingCompilerError as error:
      self.missing = str(error)
    self._known: dict[RunSpec, Estimate] = {}
    self._programs: dict[RunSpec, Any] = {}

  def prepare(self, spec: RunSpec) -> RunSpec:
    """Returns a run that is resolved for the base and laid out on the machine.

    Where its mesh is the default, many devices share the parameters too.

    Args:
      spec: The resolved config.

    Raises:
      ConfigError: It does not fit the base or the devices.
    """
    spec = resolve(spec, self.config)
    count = self.machine.devices
    if spec.mesh.sizes == MeshSpec().sizes and count > 1:
      spec = dataclasses.replace(spec, mesh=shared(spec.mesh, count))
    check_rows(spec, self.row_devices(spec))
    return spec

  def row_devices(self, spec: RunSpec) -> int:
    """Returns how many devices work on rows of their own.

    Args:
      spec: The run.
    """
    data, fsdp, _ = sizes(*spec.mesh.sizes, self.machine.devices)
    return data * fsdp

  def estimate(self, spec: RunSpec) -> Estimate:
    """Returns what a step of a run takes; asked again, it is remembered.

    Args:
      spec: From `prepare`.

    Raises:
      ConfigError: The run does not fit the devices.
    """
    if spec not in self._known:
      self._known[spec] = self._estimate(spec)
    return self._known[spec]

  def count(self, spec: RunSpec) -> Estimate:
    """Returns the estimate without a compiler.

    Args:
      spec: From `prepare`.
    """
    halves = self._halves(spec, self._mesh(spec))
    parts = self._parts(spec, halves)
    away = parts.pop(ON_HOST, 0)
    parts['scratch'] = count_scratch(
      spec, self.config, halves, self.machine.platform
    )
    # Moments that lie on the host are here for the update, after all layers.
    parts['scratch'] = max(parts['scratch'], away - parts['activations'])
    return Estimate(self.machine, parts, sum(parts.values()), {}, False)

  def flops(self, spec: RunSpec) -> int:
    """Returns the operations of a step, as of all devices together.

    It is traced for one device, where the products are the same.

    Args:
      spec: From `prepare`.
    """
    return count_flops(self._traced(spec))

  def _count_kept(self, spec: RunSpec) -> int:
    """Returns the bytes that a device keeps for the backward pass.

    With remat 'full' these are the layers' inputs. Whatever it is, it grows by
    as much with every row, so two steps are traced for all numbers of rows.
    """
    rows = spec.train.rows(self.row_devices(spec))
    one, two = (self._kept_of(spec, count) for count in (1, 2))
    return int(one + (rows - 1) * (two - one))

  def _kept_of(self, spec: RunSpec, rows: int) -> float:
    """Returns the bytes that one of the devices keeps of some rows.

    Activations as wide as the residual stream or an adapter are taken for
    these; others are heads or a part of the MLP, and cut along 'tensor'.
    """
    tensor = sizes(*spec.mesh.sizes, self.machine.devices)[2]
    whole = {1, self.config.embed_dim, spec.lora and spec.lora.rank}

    def size(array: Any) -> float:
      total = math.prod(array.shape) * array.dtype.itemsize
      return total / (1 if array.shape[-1] in whole else tensor)

    train = dataclasses.replace(spec.train, batch_size=rows, accumulate=1)
    spec = dataclasses.replace(spec, train=train)
    return count_kept(self._traced(spec), size)

  def _traced(self, spec: RunSpec) -> Any:
    """Returns the program of a step on one device; it is remembered."""
    spec = dataclasses.replace(spec, mesh=MeshSpec())
    if spec not in self._programs:
      mesh = make_mesh(1, devices=jax.devices('cpu')[:1])
      halves = self._halves(spec, mesh)
      step = make_program(spec, self.config, halves, mesh).step
      batch = abstract_batch(spec, mesh)
      traced = step.trace(halves.state, halves.frozen, batch)
      self._programs[spec] = traced.jaxpr
    return self._programs[spec]

  def _estimate(self, spec: RunSpec) -> Estimate:
    if not self.can_compile(spec):
      return self.count(spec)
    self.compiles += 1
    mesh = self._mesh(spec)
    halves = self._halves(spec, mesh)
    traced = make_program(spec, self.config, halves, mesh).step.trace(
      halves.state, halves.frozen, abstract_batch(spec, mesh)
    )
    parts = self._parts(spec, halves)
    parts.pop(ON_HOST, None)
    lowered = traced.lower(lowering_platforms=(self.machine.platform,))
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      asked = _asked(error, sum(parts.values()), self.machine.usable)
      rest = asked - sum(parts.values())
      parts['scratch'] = max(rest, 0)
      return Estimate(self.machine, parts, asked, {}, True, refused=True)
    peak = compiled_peak(compiled)
    rest = peak - sum(parts.values())  # below zero, some was not kept
    parts['activations'] += min(rest, 0)
    parts['scratch'] = max(rest, 0)
    text = compiled.as_text()
    return Estimate(
      self.machine,
      parts,
      peak,
      moved_bytes(text),
      True,
      written=written_kernels(text, _kernels(halves)),
    )

  def can_compile(self, spec: RunSpec) -> bool:
    """Whether there is a compiler, and it knows all memories of a run.

    GPUs that are not here have no host's memory: jax would drop the word.

    Args:
      spec: The run.
    """
    on_host = spec.optim.offload and self.machine.platform == 'cuda'
    return self._devices is not None and not on_host

  def merged(self, spec: RunSpec) -> int:
    """Returns the bytes of a device that answers take with `eval.merge`.

    Args:
      spec: The run, prepared.
    """
    return count_merged(spec, self._halves(spec, self._mesh(spec)))

  def _mesh(self, spec: RunSpec) -> Mesh | AbstractMesh:
    asked = spec.mesh.sizes
    if self.can_compile(spec):
      return make_mesh(*asked, devices=self._devices)
    shape = sizes(*asked, self.machine.devices)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))

  def _halves(self, spec: RunSpec, mesh: Any) -> Halves:
    dtype = compute_dtype(spec.train.dtype, self.machine.platform)
    steps = spec.train.steps or _STEPS
    return abstract_halves(spec, self.config, dtype, mesh, steps)

  def _parts(self, spec: RunSpec, halves: Halves) -> dict[str, int]:
    parts = bytes_by_part(halves.frozen, halves.state)
    parts['gradients'] = count_gradients(spec, parts['trainable'])
    parts['activations'] = self._count_kept(spec)
    return parts


def _kernels(halves: Halves) -> set[tuple[int, int]]:
  """Returns [in, out] of what is stored quantized, whole and cut."""
  leaves = jax.tree.leaves(halves.frozen, is_leaf=is_quantized)
  whole = {x.shape[-2:] for x in leaves if is_quantized(x)}
  cut = halves.shardings.mesh.shape['tensor']
  return {
    sides
    for n, out in whole
    for sides in ((n, out), (n // cut, out), (n, out // cut))
  }


def _asked(error: Exception, least: int, usable: int) -> int:
  """Returns the bytes that a compiler refused, as its message says.

  Raises:
    ConfigError: It refused for another reason.
  """
  text = str(error)
  if 'RESOURCE_EXHAUSTED' not in text:
    raise ConfigError(
      f'the compiler refuses this step: {text:.300}; change the mesh or the'
      ' target'
    ) from error
  if (match := _REFUSED.search(text)) is None:
    return max(least, usable + GIB)
  return max(least, int(float(match[1]) * _UNITS[match[2]]))
