"""A base's parameters on their way from disk to where they are used."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.bases import Base
from jlora.checkpoints.starts import Starts
from jlora.core.decompositions import Start
from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec
from jlora.core.split import make_split, split_leaf
from jlora.core.tree import nest
from jlora.models import families
from jlora.parallel.shardings import Shardings


def load_halves(
  key: jax.Array,
  base: Base,
  spec: LoraSpec | None,
  quant: QuantSpec | None,
  dtype: Any,
  *,
  starts: Starts | None = None,
  shardings: Shardings | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Start]]:
  """Reads a base leaf by leaf and splits each one as it arrives.

  The dense form of a quantized leaf is dropped before the next is read. The
  result is that of `jlora.partition` on the whole base, in another dtype.

  Args:
    key: PRNG key of the adapters.
    base: From `open_base`.
    spec: What is trained, presets resolved; None for nothing.
    quant: What is quantized, presets resolved; None for nothing.
    dtype: Of the dense frozen leaves, and what the quantized ones compute in.
    starts: How adapters that are a part of the base started before, by path;
      None finds it.
    shardings: Where both halves lie; None for the default device.

  Returns:
    The frozen and the trainable half of the decoder's params, and how such
    adapters started, on the host.

  Raises:
    ConfigError: The specs do not fit the base.
    BaseModelError: A tensor is damaged.
  """
  split = make_split(families.shapes(base.config), spec, quant)
  starts = starts or {}
  trained, found = {}, {}

  def place(path: str, leaf: Any) -> Any:
    start, leaf = starts.get(path), jnp.asarray(leaf)
    half = split_leaf(split, key, path, leaf, dtype=dtype, start=start)
    frozen = half.frozen
    if shardings is not None:
      frozen = jax.device_put(frozen, shardings.of_leaf(path, frozen))
    if half.trained:
      trained[path] = half.trained
    if half.start is not None:  # copies: training takes the arrays themselves
      found[path] = jax.tree.map(np.array, half.start)
    return jax.block_until_ready(frozen)

  frozen, trainable = base.load_params(place=place), nest(trained)
  if shardings is not None:
    trainable = jax.device_put(trainable, shardings.trainable(trainable))
  return frozen, trainable, found


def load_frozen(
  base: Base,
  quant: QuantSpec | None,
  dtype: Any,
  *,
  whole: Collection[str] = (),
) -> dict[str, Any]:
  """Reads a base for an adapter that exists already.

  Args:
    base: From `open_base`.
    quant: As in `load_halves`.
    dtype: As in `load_halves`.
    whole: Patterns of the leaves that the adapter replaces.

  Returns:
    The frozen half of the decoder's params.
  """
  spec = LoraSpec(targets=(), train_full=tuple(whole)) if whole else None
  return load_halves(jax.random.key(0), base, spec, quant, dtype)[0]
