"""How fast devices can multiply matrices, as their makers say."""

import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

# Dense bfloat16 products that accumulate in float32, in TFLOP/s of one device
# as jax counts them, without the sparsity that data sheets often include. The
# first pattern that matches the whole `device_kind` wins. Sources: data sheets
# of NVIDIA's H100, H200, A100, L4, L40S, A10 and A40, the white papers of GA102
# (RTX 30, A6000, A10G), AD102 (RTX 40) and Blackwell (RTX 50), and
# cloud.google.com/tpu/docs for TPUs.
_PEAKS = (
  ('NVIDIA H200 NVL', 835.5),
  ('NVIDIA H100 PCIe', 756.5),
  ('NVIDIA H100 NVL', 835.5),
  ('NVIDIA (H100|H200|GH200).*', 989.5),
  ('NVIDIA A100.*', 312.0),
  ('NVIDIA A10', 125.0),
  ('NVIDIA A10G', 70.0),
  ('NVIDIA A40', 149.7),
  ('NVIDIA L4', 121.0),
  ('NVIDIA L40S', 362.0),
  ('NVIDIA RTX A6000', 154.8),
  ('NVIDIA GeForce RTX 3090', 71.0),
  ('NVIDIA GeForce RTX 4090', 165.2),
  ('NVIDIA GeForce RTX 5090', 209.5),
  ('TPU v4', 275.0),
  ('TPU v5 lite|TPU v5e', 197.0),
  ('TPU v5|TPU v5p', 459.0),
  ('TPU v6 lite|TPU v6e', 918.0),
)


def peak_flops(devices: Iterable[Any], dtype: Any) -> float | None:
  """Returns the operations a second that devices can do in matrix products.

  Args:
    devices: Such as `jax.devices()`.
    dtype: What is multiplied.

  Returns:
    Of all of them together. None where nobody says it: of CPUs, of devices
    that are not listed, and of other numbers than bfloat16.
  """
  if jnp.dtype(dtype) != jnp.bfloat16:
    return None
  each = [_peak(device.device_kind) for device in devices]
  return None if None in each else sum(each)


def _peak(kind: str) -> float | None:
  found = (peak for name, peak in _PEAKS if re.fullmatch(name, kind))
  peak = next(found, None)
  return None if peak is None else peak * 1e12
