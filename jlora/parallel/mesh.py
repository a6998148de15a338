"""The mesh of devices and what lies where on it."""

import math
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
  shape = sizes(data, fsdp, tensor, devices.size)
  # Auto: look-ups by index fail on the Explicit axes that jax defaults to.
  return Mesh(
    devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def sizes(
  data: int, fsdp: int, tensor: int, devices: int
) -> tuple[int, int, int]:
  """Returns the axes' sizes with -1 replaced by what is left.

  Args:
    data: As in `make_mesh`.
    fsdp: As in `make_mesh`.
    tensor: As in `make_mesh`.
    devices: How many there are.

  Raises:
    ConfigError: As in `make_mesh`.
  """
  asked = (data, fsdp, tensor)
  fixed = math.prod(size for size in asked if size != -1)
  left = devices // fixed if fixed > 0 else 0
  found = tuple(left if size == -1 else size for size in asked)
  if asked.count(-1) > 1 or min(found) < 1 or math.prod(found) != devices:
    raise ConfigError(
      f'mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {devices}'
      f' devices; their product must be {devices}, with at most one -1 for'
      ' what is left'
    )
  return found


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of [batch, …] arrays over 'data' and 'fsdp'."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
