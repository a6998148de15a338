import resource

import jax

from jlora.training import artifacts


def test_the_process_peak_is_in_bytes():
  peak = artifacts.process_peak()
  # A Python with JAX takes more than 50 MB, and no test takes 1 TB.
  assert 50e6 < peak < 1e12
  assert peak >= resource.getpagesize()


def test_versions_name_what_numbers_depend_on():
  found = artifacts.versions()
  assert found['jax'] == jax.__version__
  assert found['backend'] == jax.default_backend()
  assert {'jlora', 'python', 'optax', 'numpy'} <= found.keys()
