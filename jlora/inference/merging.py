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

from jlora.checkpoints.bases import Base
from jlora.checkpoints.weights import StoredLeaf
from jlora.core.decompositions import Start
from jlora.core.lazy import LoraArray, RowsArray, densify, is_lazy
from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.inference.tuned import Tuned

INTO = ('trained', 'original')


@dataclasses.dataclass
class Distance:
  """How far written weights are from the trained ones.

  Attributes:
    error: Sum of squares of written minus trained weights.
    update: Sum of squares of trained weights minus those of the frozen base.
    weights: Sum of squares of trained weights.
    tensors: How many were compared: each layer of a leaf is one.
    adapted: How many of them an adapter is on.
  """

  error: float = 0.0
  update: float = 0.0
  weights: float = 0.0
  tensors: int = 0
  adapted: int = 0

  @property
  def share(self) -> float:
    """The error's norm over the update's; infinite where nothing is changed."""
    return math.sqrt(self.error / self.update) if self.update else math.inf

  def add(self, written: Any, trained: Any, frozen: Any = None) -> None:
    """Counts one tensor, given as arrays of the same shape.

    Args:
      written: As it will be read again.
      trained: As the model computes with it.
      frozen: As the base has it, where an adapter is on it.
    """
    trained = np.asarray(trained, np.float32)
    self.weights += _squares(trained.copy())
    self.tensors += 1
    self.error += _squares(np.asarray(written, np.float32) - trained)
    if frozen is not None:
      self.update += _squares(np.asarray(frozen, np.float32) - trained)
      self.adapted += 1

  def add_rounding(self, written: Any, given: Any) -> None:
    """Counts what rounding made of a tensor that was counted before it."""
    self.error += _squares(np.asarray(written, np.float32) - given)

  def __str__(self) -> str:
    """Says it in one sentence."""
    over = f'(Frobenius norm over {self.tensors} tensors)'
    if self.update:
      return (
        'the written weights differ from the trained ones by'
        f" {self.share:.1%} of the adapter's own update {over}"
      )
    nothing = 'the adapter changes nothing' if self.adapted else 'no adapter'
    share = math.sqrt(self.error / self.weights) if self.weights else 0.0
    return (
      f"{nothing}, and the written weights differ from the model's by"
      f' {share:.2%} of these {over}'
    )


def _squares(x: np.ndarray) -> float:
  """Returns the sum of squares of an array, which is overwritten."""
  return float(np.sum(np.square(x, out=x), dtype=np.float64))


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
    *,
    original: StoredLeaf | None = None,
    start: Start | None = None,
    replaced: StoredLeaf | None = None,
  ):
    """Takes a leaf; nothing is computed.

    Args:
      leaf: As `combine` has it.
      dtype: What is written.
      distance: Where each layer is counted.
      original: The leaf in the base's files, where it is merged into that.
      start: What of it the adapter's start was.
      replaced: The leaf in the base's files, where it was trained whole.
    """
    self.shape = leaf.shape
    self._leaf, self._dtype, self._distance = leaf, dtype, distance
    self._original, self._start, self._replaced = original, start, replaced

  def __getitem__(self, place: int | tuple[int, ...]) -> np.ndarray:
    """Returns a layer, or an expert of it."""
    place = place if isinstance(place, tuple) else (place,)
    leaf, start = jax.tree.map(lambda x: x[place], (self._leaf, self._start))
    result = trained = np.asarray(densify(leaf, np.float32))
    if self._original:
      written = _put_on(leaf, jnp.asarray(self._original[place]), start)
      result = np.asarray(densify(written, np.float32))
    result = result.astype(self._dtype)
    frozen = self._replaced and self._replaced[place]
    if isinstance(leaf, LoraArray | RowsArray):
      frozen = densify(leaf.base, np.float32)
    self._distance.add(result, trained, frozen)
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
    distance: Where what is written is counted.
    into: 'trained', the weights that were trained on, decoded where they are
      in codes; or 'original', those of the base's files, which is another
      function.
    dtype: What they are rounded to.

  Raises:
    ConfigError: The base's files hold codes and no original weights.
  """
  check_into(into, tuned.base)
  stored, whole = tuned.base.leaves(), tuned.whole
  for path, leaf in leaves_by_path(tuned.params, is_lazy).items():
    into_it = into == 'original' and path not in whole
    yield (
      path,
      MergedLeaf(
        leaf,
        dtype,
        distance,
        original=stored[path] if into_it else None,
        start=tuned.starts.get(path) if into_it else None,
        replaced=stored[path] if path in whole else None,
      ),
    )


def check_into(into: str, base: Base) -> None:
  """Requires that a base has the weights that an adapter is merged into.

  Args:
    into: As in `merged_leaves`.
    base: The base.

  Raises:
    ConfigError: It has not.
  """
  if into == 'original' and base.codes:
    raise ConfigError(
      f'{base.name} holds codes in 4 bits, and not the weights that were'
      ' quantized'
    )
