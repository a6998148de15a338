"""Facts of jlora.parallel.mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec

from jlora.errors import ConfigError
from jlora.parallel import mesh as mesh_lib


def test_one_device_makes_a_mesh_of_three_axes():
  mesh = mesh_lib.make_mesh()
  assert dict(mesh.shape) == {
    'data': jax.device_count(),
    'fsdp': 1,
    'tensor': 1,
  }


def test_minus_one_takes_what_is_left():
  devices = [object()] * 8
  sizes = mesh_lib.sizes(-1, 2, 2, len(devices))
  assert sizes == (2, 2, 2)


@pytest.mark.parametrize(
  'axes', [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1)]
)
def test_axes_that_do_not_multiply_to_the_devices_are_refused(axes):
  with pytest.raises(ConfigError, match='does not fit 8 devices'):
    mesh_lib.sizes(*axes, 8)


def test_the_batch_lies_on_data_and_fsdp():
  mesh = mesh_lib.make_mesh()
  assert mesh_lib.by_example(mesh).spec == PartitionSpec(('data', 'fsdp'))
