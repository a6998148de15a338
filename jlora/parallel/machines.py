"""Machines by name: how many devices, of what kind, with how much memory."""

import dataclasses
import importlib.resources
import os
import pathlib
import re

from jlora.errors import ConfigError

GIB = 1 << 30
# Memory that a program cannot have, for the libraries' workspaces, the
# driver's context and what lies between buffers. A TPU's compiler counts what
# the runtime takes, and refuses what does not fit in the rest.
RESERVED = {'cuda': 0.06, 'tpu': 0.0, 'cpu': 0.06}

# GPUs without a specification: GiB, and the one of the nearest compute
# capability that has one, for which their programs are compiled.
RELATIVES = {
  'a10g': (24, 'a6000'),  # 8.6, as all with this relative or 8.9
  'l4': (24, 'a6000'),
  'l40s': (48, 'a6000'),
  'rtx3060': (12, 'a6000'),
  'rtx3090': (24, 'a6000'),
  'rtx4080': (16, 'a6000'),
  'rtx4090': (24, 'a6000'),
  'rtx5090': (32, 'rtx6000pro'),  # 12.0
  't4': (15, 'a100-40'),  # 7.5 and 8.0
}
_ANY_GPU = re.compile(r'gpu-(\d+)gb')
_ANY_RELATIVE = 'a6000'

# GiB that a compiler gives a program on one device, which is a whole chip, and
# the shapes of slices by their number of chips.
_FLAT = {
  1: '1x1',
  4: '2x2',
  8: '2x4',
  16: '4x4',
  32: '4x8',
  64: '8x8',
  128: '8x16',
  256: '16x16',
}
_DEEP = {
  4: '2x2x1',
  8: '2x2x2',
  16: '2x2x4',
  32: '2x4x4',
  64: '4x4x4',
  128: '4x4x8',
}
TPUS = {
  'v5e': (15.75, _FLAT),
  'v5p': (95.74, _DEEP),
  'v6e': (31.25, _FLAT),
}
_COUNTED = re.compile(r'(.*?)(?:-(\d+))?')


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices of one kind.

  Attributes:
    name: What it was asked for as.
    platform: 'cuda', 'tpu' or 'cpu', as jax calls them.
    devices: How many.
    memory: Bytes of each.
    kind: The specification it is compiled for: a file in `targets`, or a shape
      such as 'v5e:4x4'; empty for a CPU.
    relative: Whether that specification is of another card.
  """

  name: str
  platform: str
  devices: int
  memory: int
  kind: str = ''
  relative: bool = False

  @property
  def usable(self) -> int:
    """Bytes of each device that a program can have."""
    return int(self.memory * (1 - RESERVED[self.platform]))

  def describe(self) -> str:
    """Returns one line: devices, memory, reserve, and what it stands for."""
    text = f'{self.name}: {self.devices} × {self.memory / GIB:.2f} GiB'
    if reserved := RESERVED[self.platform]:
      text += f', {reserved:.0%} of it kept free'
    if self.relative:
      text += f'; compiled for its relative {self.kind}'
    return text


def specification(kind: str) -> str:
  """Returns the text of XLA's specification of a GPU.

  Args:
    kind: Name of a file in `targets`.
  """
  return (_folder() / f'{kind}.txtpb').read_text()


def _folder() -> pathlib.Path:
  return pathlib.Path(str(importlib.resources.files('jlora.parallel'))) / (
    'targets'
  )


def specified() -> list[str]:
  """Returns the GPUs that have a specification, by name."""
  return sorted(file.stem for file in _folder().glob('*.txtpb'))


def find_machine(name: str) -> Machine:
  """Returns the machine of a name.

  Args:
    name: 'cpu'; a GPU such as 'h100' or 'rtx4090', or 'gpu-12gb' for any card
      of so many GB; a TPU such as 'v5e-8', whose number counts chips. A number
      behind a GPU counts them: 'h100-8'.

  Raises:
    ConfigError: There is no such machine.
  """
  found = _cpu(name) or _tpu(name) or _gpu(name)
  if found is None:
    raise ConfigError(
      f'target {name!r} is not known; use {known()}; a number behind a GPU'
      " counts them, as in 'h100-8'"
    )
  return found


def known() -> str:
  """Returns the names of all machines, for an error or a flag's help."""
  gpus = ', '.join([*specified(), *RELATIVES, 'gpu-12gb (or another size)'])
  tpus = ', '.join(
    f'{kind}-{"|".join(map(str, shapes))}' for kind, (_, shapes) in TPUS.items()
  )
  return f'cpu, {gpus}, {tpus}'


def _cpu(name: str) -> Machine | None:
  match = re.fullmatch(r'cpu(?:-(\d+))?', name)
  if not match:
    return None
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  count = int(match[1] or 1)
  return Machine(name, 'cpu', count, memory // max(count, 1))


def _tpu(name: str) -> Machine | None:
  kind, _, count = name.partition('-')
  if kind not in TPUS:
    return None
  memory, shapes = TPUS[kind]
  if not count.isdecimal() or int(count) not in shapes:
    raise ConfigError(
      f'target {name!r} is no slice of {kind}; its chips can be'
      f' {", ".join(map(str, shapes))}, such as {kind}-8'
    )
  shape = f'{kind}:{shapes[int(count)]}'
  return Machine(name, 'tpu', int(count), int(memory * GIB), shape)


def _gpu(name: str) -> Machine | None:
  """Returns GPUs; the longest name of a card wins over a count behind it."""
  cards = specified()
  base, count = (name, 1)
  if name not in cards and not _ANY_GPU.fullmatch(name):
    match = _COUNTED.fullmatch(name)
    base, count = match[1], int(match[2] or 1)
  if count < 1:
    return None
  if base in cards:
    size = re.search(r'device_memory_size: (\d+)', specification(base))
    return Machine(name, 'cuda', count, int(size[1]), base)
  if match := _ANY_GPU.fullmatch(base):
    memory, relative = int(match[1]), _ANY_RELATIVE
  elif base in RELATIVES:
    memory, relative = RELATIVES[base]
  else:
    return None
  return Machine(name, 'cuda', count, memory * GIB, relative, True)
