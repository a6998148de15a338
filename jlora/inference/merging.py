"""A model and its adapter as plain weights, and how far these are off.

An adapter that was trained on 4-bit codes fits the weights that these stand
for. Written into others, such as those that were quantized, it is another
function: the difference counts, as a share of what the adapter changes.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.weights import StoredLeaf
from jlora.core.decompositions import Start
from jlora.core.lazy import LoraArray, RowsArray, densify, is_lazy
from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.inference.tuned import Tuned

INTO = ('trained', 'original')


@dataclasses.dataclass
class Distance:
  """How far written kernels are from the trained ones.

  Attributes:
    error: Sum of squares of written minus trained weights.
    update: Sum of squares of trained weights minus those of the frozen base.
    kernels: How many adapted matrices were compared.
  """

  error: float = 0.0
  update: float = 0.0
  kernels: int = 0

  @property
  def share(self) -> float:
    """The error's norm over the update's; infinite where nothing is changed."""
    return math.sqrt(self.error / self.update) if self.update else math.inf

  def add(
    self, written: Any, trained: Any, frozen: Any, *, kernels: int = 1
  ) -> None:
    """Counts kernels, given as arrays of the same shape."""
    trained = np.asarray(trained, np.float32)
    for name, other in (('error', written), ('update', frozen)):
      part = np.asarray(other, np.float32) - trained
      squares = np.sum(np.square(part, out=part), dtype=np.float64)
      setattr(self, name, getattr(self, name) + float(squares))
    self.kernels += kernels

  def __str__(self) -> str:
    """Says it in one sentence."""
    if not self.update:
      return 'the adapter changes nothing'
    return (
      'the written weights differ from the trained ones by'
      f" {self.share:.1%} of the adapter's own update (Frobenius norm over"
      f' {self.kernels} kernels)'
    )


class MergedLeaf:
  """A leaf of the merged model, made one layer at a time.

  Attributes:
    shape: The leaf's.
  """

  def __init__(
    self,
    leaf: Any,
    dtype: np.dtype,
    distance: Distance,
    original: StoredLeaf | None,
    start: Start | None,
  ):
    """Takes a leaf; nothing is computed.

    Args:
      leaf: As `combine` has it.
      dtype: What is written.
      distance: Where each layer is counted.
      original: The leaf in the base's files, where it is merged into that.
      start: What of it the adapter's start was.
    """
    self.shape = leaf.shape
    self._leaf, self._dtype, self._distance = leaf, dtype, distance
    self._original, self._start = original, start

  def __getitem__(self, place: int | tuple[int, ...]) -> np.ndarray:
    """Returns a layer, or an expert of it."""
    place = place if isinstance(place, tuple) else (place,)
    leaf = self._leaf
    if not is_lazy(leaf):
      leaf = (self._original or leaf)[place]
      return np.asarray(leaf).astype(self._dtype)
    leaf, start = jax.tree.map(lambda x: x[place], (leaf, self._start))
    written = leaf
    if self._original:
      written = _put_on(leaf, jnp.asarray(self._original[place]), start)
    result = np.asarray(densify(written, np.float32)).astype(self._dtype)
    if isinstance(leaf, LoraArray):
      trained = densify(leaf, np.float32)
      self._distance.add(result, trained, densify(leaf.base, np.float32))
    return result

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """Returns a leaf that is not stacked."""
    del copy
    return self[()].astype(dtype or self._dtype, copy=False)


def _put_on(leaf: Any, original: jax.Array, start: Start | None) -> Any:
  """Returns a leaf with other weights under its adapter."""
  if not isinstance(leaf, LoraArray | RowsArray):
    return original
  leaf = dataclasses.replace(leaf, base=original)
  if start is None:
    return leaf
  a, b = start.taken or (start.a, start.b)  # the base still has these
  return dataclasses.replace(
    leaf,
    a=jnp.concatenate([leaf.a, a], axis=-1),
    b=jnp.concatenate([leaf.b, -b], axis=-2),
  )


def merged_leaves(
  tuned: Tuned, distance: Distance, *, into: str, dtype: np.dtype
) -> Iterator[tuple[str, MergedLeaf]]:
  """Yields the leaves of base and adapter as one, sums formed in float32.

  Args:
    tuned: The model.
    distance: Where the written kernels are counted.
    into: 'trained', the weights that were trained on, decoded where they are
      in codes; or 'original', those of the base's files, which is another
      function.
    dtype: What they are rounded to.

  Raises:
    ConfigError: The base's files hold codes and no original weights.
  """
  if into == 'original' and tuned.base.codes:
    raise ConfigError(
      f'--into=original: {tuned.base.name} holds codes in 4 bits, and not the'
      ' weights that were quantized; use --into=trained, or name these with'
      ' --base=ORIGINAL --adapter=DIR --allow_other_base'
    )
  stored = tuned.base.leaves() if into == 'original' else {}
  starts = tuned.starts if into == 'original' else {}
  whole = set(leaves_by_path(tuned.trainable))
  for path, leaf in leaves_by_path(tuned.params, is_lazy).items():
    original = None if f'{path}/full' in whole else stored.get(path)
    yield path, MergedLeaf(leaf, dtype, distance, original, starts.get(path))
