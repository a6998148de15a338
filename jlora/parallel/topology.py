"""Devices that are not here, for compiling ahead of time.

The one module that may reach into jax's private parts: without a driver, the
CUDA plugin's own start-up check fails, and only registering its library by
hand lets its compiler be used.
"""

import importlib.resources
import logging
import pathlib

import jax
import numpy as np
from jax.experimental import topologies

from jlora.errors import ConfigError


def gpu_devices(target: str, count: int = 1) -> np.ndarray:
  """Returns abstract GPUs that a mesh can be made of.

  Args:
    target: Name of a specification in `targets`, such as 'h100'. They are
      files of XLA's repository (`xla/backends/gpu/target_config/specs`,
      Apache-2.0).
    count: Number of GPUs.

  Returns:
    Array [count] of devices. Functions lowered for `lowering_platforms=
    ('cuda',)` over their mesh compile with the real GPU compiler.

  Raises:
    ConfigError: There is no such specification, or no CUDA plugin.
  """
  folder = importlib.resources.files('jlora.parallel') / 'targets'
  file = folder / f'{target}.txtpb'
  if not file.is_file():
    known = sorted(f.name.removesuffix('.txtpb') for f in folder.iterdir())
    raise ConfigError(
      f'target {target!r} has no specification; use one of {known}'
    )
  _register_cuda()
  topology = topologies.get_topology_desc(
    platform='cuda',
    topology_name=target,
    topology=f'1x1x{count}',
    target_config=file.read_text(),
  )
  return np.asarray(topology.devices)


def _register_cuda() -> None:
  from jax._src import xla_bridge

  logging.getLogger('jax._src.xla_bridge').setLevel(logging.CRITICAL)
  xla_bridge._discover_and_register_pjrt_plugins()
  if 'cuda' in xla_bridge._topology_factories:
    return
  site = pathlib.Path(jax.__file__).parent.parent
  found = sorted(site.glob('jax_plugins/xla_cuda*/xla_cuda_plugin.so'))
  if not found:
    raise ConfigError(
      "compiling for a GPU needs the CUDA plugin; pip install -e '.[cuda13]'"
    )
  xla_bridge.register_plugin('cuda', library_path=str(found[0]))
