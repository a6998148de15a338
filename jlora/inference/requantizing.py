"""A merged model in codes again, which mostly takes the adapter back out.

What an adapter changes is small beside the steps between levels: rounding to
codes leaves little of it. So how much is left is counted before it is written.
"""

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.lazy import LoraArray, densify, is_lazy
from jlora.core.quantization import QuantSpec, quantize_leaf, select_whole
from jlora.core.quantized import QuantizedArray, dequantize_leaf
from jlora.core.tree import leaves_by_path
from jlora.inference.merging import Distance, merged_leaves
from jlora.inference.tuned import Tuned
from jlora.models import families, layout


@dataclasses.dataclass(frozen=True)
class Requantized:
  """A merged model in codes.

  Attributes:
    codes: The kernels that were in codes, by path.
    rest: All other leaves, adapters included, by path; lazy where they were.
    distance: How far what is written is from what was trained.
    changed: Share of the codes of adapted kernels that are not as before.
  """

  codes: dict[str, QuantizedArray]
  rest: dict[str, Any]
  distance: Distance
  changed: float

  def __str__(self) -> str:
    """Says what is left of the adapter."""
    return (
      f"quantized again, {self.changed:.1%} of the adapted kernels' codes"
      f' change, and {self.distance}'
    )


def requantize(tuned: Tuned, dtype: np.dtype) -> Requantized:
  """Merges the adapter and quantizes the sum as the base is.

  Args:
    tuned: The model, with kernels in codes.
    dtype: What leaves that are not in codes are rounded to.
  """
  before, distance = tuned.codes, Distance()
  codes, rest = {}, {}
  changed = total = 0
  leaves = leaves_by_path(tuned.params, is_lazy)
  weights = layout.by_path(tuned.base.config)
  for path, leaf in merged_leaves(tuned, distance, into='trained', dtype=dtype):
    if path not in before:
      rest[path] = leaves[path]
      for place, _ in weights[path].places():
        leaf[place]  # which is counted
    elif not isinstance(leaves[path], LoraArray):
      codes[path] = before[path]
    else:
      codes[path] = _requantized(tuned, path, leaves[path], distance)
      changed += _count_changed(before[path], codes[path])
      total += math.prod(leaf.shape)
  return Requantized(codes, rest, distance, changed / max(total, 1))


def _requantized(
  tuned: Tuned, path: str, leaf: LoraArray, distance: Distance
) -> QuantizedArray:
  """Returns a merged kernel in codes, made layer by layer."""
  found = []
  for layer in _layers(leaf):
    trained = densify(layer, np.float32)
    found.append(_as(layer.base, trained, path, tuned))
    written, frozen = (
      dequantize_leaf(x, np.float32) for x in (found[-1], layer.base)
    )
    for place in np.ndindex(layer.stacked):
      distance.add(written[place], trained[place], frozen[place])
  if len(found) == 1:
    return found[0]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def _layers(leaf: LoraArray) -> Iterator[LoraArray]:
  """Yields the layers of a stack, each a stack of one, or the only kernel."""
  if not leaf.stacked:
    yield leaf
    return
  for i in range(leaf.stacked[0]):
    at = slice(i, i + 1)
    yield jax.tree.map(operator.itemgetter(at), leaf)


def _as(
  like: QuantizedArray, kernel: Any, path: str, tuned: Tuned
) -> QuantizedArray:
  """Quantizes a kernel as another one is."""
  spec = QuantSpec(
    format=like.format,
    block_size=like.block_size,
    double_quant=like.scales2 is not None,
    dtype=like.dtype,
  )
  axes = families.resolve(spec, tuned.base.config)
  return quantize_leaf(kernel, select_whole({path: kernel}, axes)[path], spec)


def _count_changed(before: QuantizedArray, after: QuantizedArray) -> int:
  """Returns how many codes differ."""
  bits = np.asarray(before.codes) ^ np.asarray(after.codes)
  if before.codes_per_byte == 1:
    return np.count_nonzero(bits)
  return np.count_nonzero(bits >> 4) + np.count_nonzero(bits & 15)
