"""What lazy leaves have in common: a shape, a dtype, and no array."""

import dataclasses
import math
from typing import Any, NoReturn

import jax.numpy as jnp

from jlora.core.axes import array_axes


class LazyLeaf:
  """Base of the pytree nodes that stand for a kernel.

  A subclass is a frozen dataclass with `stacked`, `inputs`, `outputs`, `order`
  and `dtype`.
  """

  @property
  def _canonical_shape(self) -> tuple[int, ...]:
    return (*self.stacked, *self.inputs, *self.outputs)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the kernel that this stands for, in its own order."""
    canonical = self._canonical_shape
    return tuple(canonical[i] for i in array_axes(self.order, len(canonical)))

  @property
  def ndim(self) -> int:
    """Number of axes of the kernel."""
    return len(self._canonical_shape)

  @property
  def size(self) -> int:
    """Number of weights in the kernel."""
    return math.prod(self._canonical_shape)

  def astype(self, dtype: Any) -> Any:
    """Returns the same leaf, to be computed with in another dtype."""
    return dataclasses.replace(self, dtype=jnp.dtype(dtype))

  def _refuse(self, *_: Any) -> NoReturn:
    raise TypeError(
      f'a lazy {type(self).__name__} of shape {self.shape} met code that takes'
      ' plain arrays; call that code through jlora.lift(fn), such as'
      ' jlora.lift(model.apply), or form plain arrays with jlora.merge or'
      ' jlora.dequantize'
    )

  __jax_array__ = __array__ = _refuse
  __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = _refuse
  __getitem__ = _refuse
