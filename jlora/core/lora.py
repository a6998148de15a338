"""Which leaves are adapted, and the lazy leaf that stands for one of them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core import targets
from jlora.core.axes import Axes
from jlora.core.linear import Adapter, linear
from jlora.core.quantized import QuantizedArray, dequantize_leaf
from jlora.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
  """Which leaves are trained, and how.

  The update of a kernel is `(alpha / rank) * a @ b`.

  Attributes:
    rank: Inner size of the adapters.
    alpha: Strength of the adapters.
    targets: Kernels with an adapter: 'all-linear', or patterns over whole leaf
      paths.
    exclude: Patterns that take kernels out again.
    axes: Roles of kernels' axes, see `jlora.core.axes`.
    dropout: Share of the adapters' inputs that is dropped in training.
    train_full: Patterns of leaves that are trained whole, such as norms.

  References:
    Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: str | tuple[str, ...] = targets.ALL_LINEAR
  exclude: tuple[str, ...] = ()
  axes: Axes = ()
  dropout: float = 0.0
  train_full: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    """Checks the fields and turns lists and dicts into tuples."""
    if not (self.rank >= 1 and self.rank % 1 == 0):
      raise ConfigError(
        f'lora.rank is {self.rank}; it must be a whole number, 1 or more'
      )
    object.__setattr__(self, 'rank', int(self.rank))
    if not (math.isfinite(self.alpha) and self.alpha > 0):
      raise ConfigError(f'lora.alpha is {self.alpha}; it must be above 0')
    if not 0 <= self.dropout < 1:
      raise ConfigError(f'lora.dropout is {self.dropout}; it must be in [0, 1)')
    targets.normalize_patterns(self, 'targets', 'exclude', 'train_full')

  @property
  def scale(self) -> float:
    """What the product of the adapters is multiplied by."""
    return self.alpha / self.rank


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('base', 'a', 'b', 'scale', 'key'),
  meta_fields=('inputs', 'outputs', 'dropout'),
)
@dataclasses.dataclass(frozen=True)
class LoraArray:
  """A frozen kernel with an adapter, as a pytree node: `W + scale * a @ b`.

  Every field keeps the stacked axes, so a scan over layers slices them all.

  Attributes:
    base: The kernel, dense or quantized, [..., *inputs, *outputs].
    a: float32 [..., in, rank].
    b: float32 [..., rank, out].
    scale: float32 [...].
    key: PRNG keys [...] of the dropout, or None for none.
    inputs: Sizes of the input axes.
    outputs: Sizes of the output axes.
    dropout: Share of the adapter's inputs to drop where there is a key.
  """

  base: jax.Array | QuantizedArray
  a: jax.Array
  b: jax.Array
  scale: jax.Array
  key: jax.Array | None
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  dropout: float

  @property
  def stacked(self) -> tuple[int, ...]:
    """Sizes of the stacked axes."""
    return self.a.shape[:-2]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the kernel."""
    return self.base.shape

  @property
  def ndim(self) -> int:
    """Number of axes of the kernel."""
    return len(self.shape)

  @property
  def dtype(self) -> Any:
    """What the kernel computes in."""
    return self.base.dtype

  def astype(self, dtype: Any) -> 'LoraArray':
    """Returns the kernel with its base in another dtype."""
    return dataclasses.replace(self, base=self.base.astype(dtype))


LazyArray = QuantizedArray | LoraArray


def is_lazy(leaf: Any) -> bool:
  """Whether a leaf stands for a kernel that is not there as a plain array."""
  return isinstance(leaf, QuantizedArray | LoraArray)


def densify(leaf: Any, dtype: Any = None) -> Any:
  """Returns the plain array that a leaf stands for.

  Args:
    leaf: A lazy leaf, or an array, which is returned as it is.
    dtype: Of the result; None is the leaf's. The sum `W + scale * a @ b` is
      formed in float32 and rounded once.
  """
  if isinstance(leaf, QuantizedArray):
    return dequantize_leaf(leaf, dtype)
  if not isinstance(leaf, LoraArray):
    return leaf if dtype is None else leaf.astype(dtype)
  base = densify(leaf.base, jnp.float32)
  scale = leaf.scale[..., None, None]
  update = scale * jnp.matmul(leaf.a, leaf.b, precision='highest')
  return (base + update.reshape(base.shape)).astype(dtype or leaf.dtype)


def apply_kernel(
  x: jax.Array, leaf: LazyArray, dtype: Any = None, precision: Any = None
) -> jax.Array:
  """Multiplies by an unstacked lazy kernel without forming it.

  Args:
    x: [..., in], the input axes flattened.
    leaf: A kernel without stacked axes.
    dtype: Of the result; None is that of `x`.
    precision: As in `jax.lax.dot_general`.

  Returns:
    [..., out], the output axes flattened.
  """
  if isinstance(leaf, QuantizedArray):
    return linear(x, leaf, dtype=dtype, precision=precision)
  base = leaf.base
  if not isinstance(base, QuantizedArray):
    base = base.reshape(math.prod(leaf.inputs), math.prod(leaf.outputs))
  adapter = Adapter(leaf.a, leaf.b, leaf.scale)
  branch = None
  if leaf.key is not None and leaf.dropout:
    branch = _drop(x, leaf.key, leaf.dropout)
  return linear(
    x, base, adapter, branch=branch, dtype=dtype, precision=precision
  )


def _drop(x: jax.Array, key: jax.Array, share: float) -> jax.Array:
  kept = jax.random.bernoulli(key, 1 - share, x.shape)
  return jnp.where(kept, x * np.asarray(1 / (1 - share), x.dtype), 0)
