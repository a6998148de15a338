"""What one step takes on a machine, as compiled or as counted."""

import dataclasses
from collections.abc import Iterator

from jlora.parallel.machines import GIB, Machine

# Between steps, and within one; the last is whatever else the compiler needs.
KEPT = ('frozen, quantized', 'frozen, dense', 'trainable', 'optimizer state')
WITHIN = ('gradients', 'activations', 'scratch')
# jax takes this share of a GPU's memory unless told otherwise.
_PREALLOCATED = 0.75


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What one training step takes.

  Attributes:
    machine: Where.
    parts: Bytes of each device by part, `KEPT` and `WITHIN`.
    peak: Bytes of each device at the peak: arguments + temporary buffers +
      results - buffers shared by both.
    moved: Bytes that a device exchanges, by kind of collective.
    compiled: Whether a compiler said so; else it is counted.
    refused: Whether the compiler gave up for lack of memory; `peak` is then
      what it asked for.
    written: Bytes of dense kernels that a device writes to its memory in a
      step, by dtype: what decoding costs beside the products.
  """

  machine: Machine
  parts: dict[str, int]
  peak: int
  moved: dict[str, int]
  compiled: bool
  refused: bool = False
  written: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def headroom(self) -> int:
    """Usable bytes that are left; below zero, those that are missing."""
    return self.machine.usable - self.peak

  @property
  def fits(self) -> bool:
    """Whether it can run."""
    return self.headroom >= 0 and not self.refused

  def verdict(self) -> str:
    """Returns whether it fits, and by how much."""
    if self.fits:
      return f'fits, {self.headroom / GIB:.2f} GiB to spare'
    if self.refused and self.headroom >= 0:
      return 'does not fit: the compiler refuses it'
    return f'does not fit, {-self.headroom / GIB:.2f} GiB too much'

  def rows(self) -> Iterator[tuple[str, str]]:
    """Yields the lines of the table: what, and how much."""
    for part, size in self.parts.items():
      yield part, f'{size / GIB:,.2f} GiB'
    how = 'compiled peak' if self.compiled else 'counted peak (not compiled)'
    yield how, f'{self.peak / GIB:,.2f} GiB'
    for dtype, size in self.written.items():
      yield f'kernels decoded, {dtype}', f'{size / GIB:,.2f} GiB written a step'
    yield 'usable', f'{self.machine.usable / GIB:,.2f} GiB'
    yield 'verdict', self.verdict()
    if self.machine.devices > 1:
      yield from self._moved()
    if self._needs_fraction():
      yield 'set', 'XLA_PYTHON_CLIENT_MEM_FRACTION=.94; jax takes .75 otherwise'

  def answers(self, merged: int) -> str:
    """Returns what a run holds while it answers prompts with `eval.merge`.

    Args:
      merged: Bytes of the merged weights on each device.
    """
    total = merged + sum(self.parts.get(part, 0) for part in KEPT)
    fits = 'fits' if total <= self.machine.usable else 'does not fit'
    return (
      f'{merged / GIB:,.2f} GiB beside what is kept between steps:'
      f' {total / GIB:,.2f} GiB without caches, {fits}'
    )

  def _moved(self) -> Iterator[tuple[str, str]]:
    if not self.compiled:
      yield 'moved a step', 'known once compiled'
      return
    for kind, size in self.moved.items():
      yield f'{kind}, a step', f'{size / GIB:,.3f} GiB a device'

  def _needs_fraction(self) -> bool:
    taken = _PREALLOCATED * self.machine.memory
    return self.fits and self.machine.platform == 'cuda' and self.peak > taken
