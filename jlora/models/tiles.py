"""Which squares of the matrix of attention scores have to be computed.

Queries and keys are cut into blocks. A tile is a block of queries beside one of
keys; those above the diagonal, or beyond a window, are in no list, and those
whose queries and keys share no segment are skipped as the loop comes to them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# (first query, first key, keys, carry) -> carry
Body = Callable[[Any, Any, int, Any], Any]

# On two CPU cores, of 64 to 512, 256 queries a tile were fastest, with scratch
# that fits the cache. Up to as many tokens, a loop that is written out is, with
# all keys that a block sees in one tile.
_BLOCK, _SHORT_BLOCK = 256, 128
_UNROLLED = 256  # tokens
_ROUNDED = 8  # tokens a block is rounded up to


class Tiling(NamedTuple):
  """How a sequence is cut.

  Attributes:
    block: Queries a tile.
    count: Blocks; they hold the sequence and a few places more.
    unrolled: Whether a block's keys are all in one tile, in a loop that is
      written out.
    window: How many keys a query sees, itself among them; None for all.
  """

  block: int
  count: int
  unrolled: bool
  window: int | None

  @property
  def length(self) -> int:
    """Places that all blocks have."""
    return self.block * self.count

  @property
  def scores(self) -> int:
    """Scores that are there at once, of one row and head."""
    return self.block * (self.length if self.unrolled else self.block)

  @property
  def pairs(self) -> list[tuple[int, int]]:
    """Blocks of queries and of keys, a query's own block first."""
    return [
      (i, j)
      for i in range(self.count)
      for j in range(i, self._first(i) - 1, -1)
    ]

  def _first(self, i: int) -> int:
    """Returns the first block of keys that a block of queries may see."""
    if self.window is None:
      return 0
    return max(i * self.block - self.window + 1, 0) // self.block

  def walk(self, body: Body, carry: Any, needed: Any, operand: Any) -> Any:
    """Returns the carry after every tile was seen.

    Where a tile stands is tied to an operand: known beside it, the masks of all
    tiles would be taken out of the loop over layers, and they are length^2.

    Args:
      body: What is done with a tile.
      carry: What it starts with.
      needed: bool [tiles], which of `pairs` have to be seen; None for all.
      operand: An array that differs from layer to layer.
    """
    if self.unrolled:
      for i in range(self.count):
        first = self._first(i)
        width = (i + 1 - first) * self.block
        carry = body(i * self.block, first * self.block, width, carry)
      return carry

    def step(carry: Any, tile: Any) -> tuple[Any, None]:
      i, j, hit = tile
      if hit is None:
        return body(i, j, self.block, carry), None
      do = lambda carry: body(i, j, self.block, carry)  # noqa: E731
      return jax.lax.cond(hit, do, lambda carry: carry, carry), None

    queries, keys = (np.array(self.pairs, np.int32) * self.block).T
    tiles = (jnp.asarray(queries), jnp.asarray(keys), needed)
    tiles, _ = jax.lax.optimization_barrier((tiles, operand))
    return jax.lax.scan(step, carry, tiles)[0]

  def needed(self, segments: Any, reach: Any) -> jax.Array | None:
    """Returns which of `pairs` hold anything that is seen; None if all do.

    Args:
      segments: int [batch, length] or None, as `Sight` has them.
      reach: int scalar or None, likewise.
    """
    if self.unrolled or (segments is None and reach is None):
      return None
    i, j = np.array(self.pairs, np.int32).T
    found = jnp.ones(len(i), bool)
    if reach is not None:
      found &= jnp.asarray((i - j - 1) * self.block + 1) < reach
    if segments is not None:
      blocks = segments.reshape(len(segments), self.count, self.block)
      low, high = blocks.min(axis=-1), blocks.max(axis=-1)
      meet = (low[:, i] <= high[:, j]) & (low[:, j] <= high[:, i])
      found &= meet.any(axis=0)
    return found


def make_tiling(length: int, window: int | None) -> Tiling:
  """Returns how a sequence is cut.

  Args:
    length: Its tokens.
    window: As `Tiling` has it.
  """
  unrolled = length <= _UNROLLED
  size = _SHORT_BLOCK if unrolled else _BLOCK
  count = -(-length // size)
  block = -(-length // (count * _ROUNDED)) * _ROUNDED
  return Tiling(block, count, unrolled, window)
