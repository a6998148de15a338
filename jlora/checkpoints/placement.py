"""A base's parameters on their way from disk to where they are used."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from jlora.checkpoints.bases import Base
from jlora.core.quantization import (
  QuantSpec,
  quantize_leaf,
  select_whole,
)
from jlora.models import families


def load_params(
  base: Base,
  quant: QuantSpec | None,
  dtype: Any,
  *,
  whole: Collection[str] = (),
) -> dict[str, Any]:
  """Reads a base leaf by leaf and quantizes each one as it arrives.

  The dense form of a quantized leaf is dropped before the next is read.

  Args:
    base: From `open_base`.
    quant: What is quantized, presets resolved; None for nothing.
    dtype: Of the dense leaves, and what the quantized ones compute in.
    whole: Paths of leaves that are trained whole: they stay float32.

  Returns:
    The decoder's params, with QuantizedArrays where `quant` says so.
  """
  shapes = {
    weight.path: jax.ShapeDtypeStruct(weight.shape, jnp.float32)
    for weight in families.weights(base.config)
    if weight.path not in whole
  }
  chosen = {}
  if quant is not None:
    chosen = select_whole(shapes, quant)

  def place(path: str, leaf: Any) -> Any:
    if path in whole:
      return jnp.asarray(leaf, jnp.float32)
    if path not in chosen:
      return jnp.asarray(leaf, dtype)
    codes = quantize_leaf(jnp.asarray(leaf), chosen[path], quant)
    return jax.block_until_ready(codes.astype(quant.dtype or dtype))

  return base.load_params(place=place)
