"""A merged model in codes again, which mostly takes the adapter back out.

What an adapter changes is small beside the steps between levels: rounding to
codes leaves little of it. So how much is left is counted before it is written.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from jlora.core.lazy import LoraArray, densify, is_lazy
from jlora.core.plan import is_frozen_leaf
from jlora.core.quantization import QuantSpec, quantize_leaf, select_whole
from jlora.core.quantized import QuantizedArray, dequantize_leaf, is_quantized
from jlora.core.tree import leaves_by_path
from jlora.inference.merging import Distance
from jlora.inference.tuned import Tuned
from jlora.models import families


@dataclasses.dataclass(frozen=True)
class Requantized:
  """A merged model in codes.

  Attributes:
    codes: The kernels that were in codes, by path.
    rest: All other leaves, adapters included, by path; lazy where they were.
    distance: How far the adapted kernels are from the trained ones.
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


def requantize(tuned: Tuned) -> Requantized:
  """Merges the adapter and quantizes the sum as the base is.

  Args:
    tuned: The model; where its base is in full precision, nothing is in codes.
  """
  before = leaves_by_path(tuned.frozen, is_frozen_leaf)
  before = {path: x for path, x in before.items() if is_quantized(x)}
  codes, rest, distance = {}, {}, Distance()
  changed = total = 0
  for path, leaf in leaves_by_path(tuned.params, is_lazy).items():
    if path not in before:
      rest[path] = leaf
      continue
    codes[path] = before[path]
    if isinstance(leaf, LoraArray):
      trained = densify(leaf, np.float32)
      codes[path] = _as(before[path], trained, path, tuned)
      changed += _count_changed(before[path], codes[path])
      total += math.prod(leaf.shape)
      distance.add(
        dequantize_leaf(codes[path], np.float32),
        trained,
        dequantize_leaf(before[path], np.float32),
        kernels=math.prod(leaf.stacked),
      )
  return Requantized(codes, rest, distance, changed / max(total, 1))


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
