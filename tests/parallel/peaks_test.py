import types

import jax
import jax.numpy as jnp
import pytest

from jlora.parallel.peaks import peak_flops


def devices(*kinds):
  return [types.SimpleNamespace(device_kind=kind) for kind in kinds]


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('NVIDIA H100 80GB HBM3', 989.5e12),
    ('NVIDIA H100 PCIe', 756.5e12),
    ('NVIDIA A100-SXM4-40GB', 312e12),
    ('NVIDIA L40S', 362e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12),
    ('NVIDIA H20', None),  # another card than an H200
    ('cpu', None),
  ],
)
def test_a_peak_is_that_of_its_kind(kind, peak):
  assert peak_flops(devices(kind), jnp.bfloat16) == peak


def test_devices_add_up_where_all_are_known():
  assert peak_flops(devices(*['TPU v4'] * 4), jnp.bfloat16) == 1100e12
  assert peak_flops(devices('TPU v4', 'TPU v9'), jnp.bfloat16) is None


def test_other_numbers_and_the_devices_here_have_no_peak():
  assert peak_flops(devices('TPU v4'), jnp.float32) is None
  assert peak_flops(jax.devices('cpu'), jnp.bfloat16) is None
