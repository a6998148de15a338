"""What this machine computes on, and in which precision."""

import pathlib
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp


def compute_dtype(name: str, platform: str | None = None) -> Any:
  """Returns the dtype that a config's `train.dtype` means.

  Args:
    name: 'float32', 'bfloat16', or 'auto': float32 on CPU, else bfloat16.
    platform: 'cpu', 'cuda' or 'tpu'; None is what is computed on here.
  """
  if name == 'auto':
    platform = platform or jax.default_backend()
    name = 'float32' if platform == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def warn_of_idle_gpu() -> None:
  """Warns once where an NVIDIA device is visible and JAX cannot use it."""
  if jax.default_backend() == 'cpu' and nvidia_is_visible():
    warnings.warn(
      'an NVIDIA device is visible, but JAX has no CUDA backend and computes on'
      " the CPU; install one with: pip install -e '.[cuda13]' (or cuda12)",
      stacklevel=2,
    )


def nvidia_is_visible() -> bool:
  """Whether a driver or its device file is here."""
  device = pathlib.Path('/dev/nvidia0')
  return device.exists() or shutil.which('nvidia-smi') is not None
