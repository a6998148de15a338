"""The mesh of devices and what lies where on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.errors import ConfigError

AXES = ('data', 'fsdp', 'tensor')


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  *,
  devices: Any = None,
) -> Mesh:
  """Returns a mesh with the axes 'data', 'fsdp' and 'tensor'.

  Args:
    data: Devices along the axis that the batch is split over; -1 takes what
      the other axes leave.
    fsdp: Devices along the axis that batch and parameters are split over.
    tensor: Devices along the axis that kernels are split over.
    devices: The devices to use; None is all of them.

  Raises:
    ConfigError: The axes do not multiply to the number of devices.
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) == 1 and fixed > 0:
    sizes[free[0]] = devices.size // fixed
  if min(sizes.values()) < 1 or np.prod(list(sizes.values())) != devices.size:
    raise ConfigError(
      f'mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit'
      f' {devices.size} devices; their product must be {devices.size}, with at'
      ' most one -1 for what is left'
    )
  # Auto: look-ups by index fail on the Explicit axes that jax defaults to.
  return Mesh(
    devices.reshape(tuple(sizes.values())),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of [batch, …] arrays over 'data' and 'fsdp'."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
