"""Devices that are not here, for compiling ahead of time.

The one module that may reach into jax's private parts: without a driver, the
CUDA plugin's own start-up check fails, and only registering its library by
hand lets its compiler be used.
"""

import importlib.util
import logging
import os
import pathlib
import re

import jax
import numpy as np
from jax.experimental import topologies

from jlora.errors import ConfigError, MissingCompilerError
from jlora.parallel.machines import Machine, specification

# What libtpu otherwise asks a TPU's own machine for; and that its compiler may
# be used while another process has it too.
_TPU_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


def devices_of(machine: Machine) -> np.ndarray:
  """Returns the devices of a machine, which a mesh can be made of.

  Functions lowered for `lowering_platforms=(machine.platform,)` over it compile
  with the machine's own compiler; nothing can be run.

  Args:
    machine: From `find_machine`.

  Returns:
    Array [devices].

  Raises:
    MissingCompilerError: The compiler is not installed.
    ConfigError: More CPU devices were asked for than there are.
  """
  make = {'cpu': _cpu_devices, 'cuda': _cuda_devices, 'tpu': _tpu_devices}
  return make[machine.platform](machine)


def _cpu_devices(machine: Machine) -> np.ndarray:
  found = jax.devices('cpu')
  if len(found) < machine.devices:
    raise ConfigError(
      f'target {machine.name!r} has {machine.devices} devices, and here'
      f' {len(found)} can be seen; set'
      f' XLA_FLAGS=--xla_force_host_platform_device_count={machine.devices}'
    )
  return np.asarray(found[: machine.devices])


def _tpu_devices(machine: Machine) -> np.ndarray:
  if importlib.util.find_spec('libtpu') is None:
    raise MissingCompilerError(
      "compiling for a TPU needs libtpu; pip install -e '.[tpu]'"
    )
  for name, value in _TPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  # A slice is made of hosts with four chips; a single chip is its own host.
  bounds = {'chips_per_host_bounds': (1, 1, 1)} if machine.devices == 1 else {}
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=machine.kind, **bounds
  )
  return np.asarray(topology.devices)


def _cuda_devices(machine: Machine) -> np.ndarray:
  _register_cuda()
  # The compiler is told the memory of the card, where it is a relative's.
  text = re.sub(
    r'(device_memory_size: )\d+',
    rf'\g<1>{machine.memory}',
    specification(machine.kind),
  )
  topology = topologies.get_topology_desc(
    platform='cuda',
    topology_name=machine.kind,
    topology=f'1x1x{machine.devices}',
    target_config=text,
  )
  return np.asarray(topology.devices)


def _register_cuda() -> None:
  """Makes the compiler of the CUDA plugin known, with or without a driver."""
  try:
    from jax._src import xla_bridge

    discover = xla_bridge._discover_and_register_pjrt_plugins
    known = xla_bridge._topology_factories
    register = xla_bridge.register_plugin
  except (ImportError, AttributeError) as error:
    raise MissingCompilerError(
      f'jax {jax.__version__} lacks what the compiler for GPUs is reached by:'
      f' {error}; use the jax that pyproject.toml names, or mend'
      ' jlora/parallel/topology.py'
    ) from error
  logging.getLogger(xla_bridge.__name__).setLevel(logging.CRITICAL)
  discover()
  if 'cuda' in known:
    return
  site = pathlib.Path(jax.__file__).parent.parent
  found = sorted(site.glob('jax_plugins/xla_cuda*/xla_cuda_plugin.so'))
  if not found:
    raise MissingCompilerError(
      "compiling for a GPU needs the CUDA plugin; pip install -e '.[cuda13]'"
    )
  register('cuda', library_path=str(found[0]))
