import warnings

import jax.numpy as jnp
import pytest

from jlora.parallel import devices


def test_a_gpu_that_jax_cannot_use_is_said_with_the_install_line(monkeypatch):
  monkeypatch.setattr(devices, 'nvidia_is_visible', lambda: True)
  monkeypatch.setattr(devices.jax, 'default_backend', lambda: 'cpu')
  with pytest.warns(UserWarning, match=r"pip install -e '\.\[cuda13\]'"):
    devices.warn_of_idle_gpu()


@pytest.mark.parametrize(
  ('visible', 'backend'), [(False, 'cpu'), (True, 'gpu')]
)
def test_nothing_is_said_without_an_idle_gpu(monkeypatch, visible, backend):
  monkeypatch.setattr(devices, 'nvidia_is_visible', lambda: visible)
  monkeypatch.setattr(devices.jax, 'default_backend', lambda: backend)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    devices.warn_of_idle_gpu()


@pytest.mark.parametrize(
  ('backend', 'dtype'), [('cpu', jnp.float32), ('tpu', jnp.bfloat16)]
)
def test_auto_is_float32_on_cpu_only(monkeypatch, backend, dtype):
  monkeypatch.setattr(devices.jax, 'default_backend', lambda: backend)
  assert devices.compute_dtype('auto') == dtype
  assert devices.compute_dtype('float32') == jnp.float32
