"""Arrays made of the pieces that this process's devices hold.

Of a stored leaf, only those pieces are kept, and each is made once. Quantized
ones are made a layer at a time. Where several processes train together, each
makes its own part of the same arrays.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora.checkpoints.stored_codes import PackedLeaf
from jlora.checkpoints.weights import Index, StoredLeaf
from jlora.core.axes import Roles
from jlora.core.quantization import (
  QuantSpec,
  quantize_absmax,
  quantize_blocks,
  quantize_leaf,
)
from jlora.core.quantized import QuantizedArray
from jlora.parallel import processes

Shape = tuple[int, ...]


def place_dense(
  leaf: StoredLeaf, dtype: Any, sharding: NamedSharding | None
) -> jax.Array:
  """Returns a leaf in full precision, read where it lies.

  Args:
    leaf: The leaf.
    dtype: Of the result.
    sharding: How it is cut; None for the default device.
  """
  leaf = leaf.rounded(dtype)
  (array,) = _place(lambda i: (leaf.read(i),), (leaf.shape,), sharding)
  return array


def place_quantized(
  leaf: StoredLeaf,
  roles: Roles,
  spec: QuantSpec,
  shardings: QuantizedArray | None,
) -> QuantizedArray:
  """Returns a kernel in 4 or 8 bits, quantized where it is read.

  Args:
    leaf: The kernel `[..., in, out]`, its axes in this order.
    roles: Roles of its axes.
    spec: How it is quantized.
    shardings: How each field is cut, codes and scales alike and between
      blocks; None for the default device.

  Returns:
    The fields of `quantize`, bit for bit.
  """
  whole = quantized_shape(leaf, roles, spec)
  codes, absmax = _place(
    functools.partial(_quantize, leaf, spec),
    (whole.codes.shape, whole.scales.shape),
    shardings and shardings.codes,
  )
  if not spec.double_quant:
    return dataclasses.replace(whole, codes=codes, scales=absmax)
  fields = ('scales', 'scales2', 'offset')
  placed = shardings and tuple(getattr(shardings, f) for f in fields)
  found = _nest(placed)(absmax)
  return dataclasses.replace(
    whole, codes=codes, **dict(zip(fields, found, strict=True))
  )


def place_stored(
  leaf: PackedLeaf, whole: QuantizedArray, shardings: QuantizedArray | None
) -> QuantizedArray:
  """Returns a kernel whose files hold its codes, which stay as they are.

  Args:
    leaf: The kernel's codes.
    whole: Shapes and dtypes of the result, from `quantized_shape`.
    shardings: As in `place_quantized`.
  """
  codes, scales = _place(
    leaf.blocks,
    (whole.codes.shape, whole.scales.shape),
    shardings and shardings.codes,
  )
  if whole.scales2 is None:
    return dataclasses.replace(whole, codes=codes, scales=scales)
  scales2, offset = place_whole(
    leaf.second_level(), shardings and (shardings.scales2, shardings.offset)
  )
  return dataclasses.replace(
    whole, codes=codes, scales=scales, scales2=scales2, offset=offset
  )


def quantized_shape(
  leaf: StoredLeaf, roles: Roles, spec: QuantSpec
) -> QuantizedArray:
  """Returns what `place_quantized` returns, in shapes and dtypes.

  Args:
    leaf: The kernel.
    roles: Roles of its axes.
    spec: How it is quantized.
  """
  shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return quantize_leaf(shape, roles, spec)


def place_whole(tree: Any, shardings: Any) -> Any:
  """Returns arrays that this process has whole, cut over all devices.

  Args:
    tree: Arrays, the same in every process.
    shardings: Of each; None for the default device.
  """
  if shardings is None:
    return jax.tree.map(jnp.asarray, tree)
  return jax.tree.map(processes.spread, tree, shardings)


def _place(
  read: Callable[[Index], tuple[np.ndarray, ...]],
  shapes: tuple[Shape, ...],
  sharding: NamedSharding | None,
) -> tuple[jax.Array, ...]:
  """Returns arrays that are cut alike.

  Args:
    read: Returns the pieces of all arrays that lie at an index of the last.
    shapes: Of the arrays.
    sharding: Of the arrays; None for the default device.
  """
  last = shapes[-1]
  if sharding is None:
    return tuple(map(jnp.asarray, read(tuple(slice(0, n) for n in last))))
  arrays: list[list[jax.Array]] = [[] for _ in shapes]
  for index, devices in _pieces(last, sharding):
    for parts, piece in zip(arrays, read(index), strict=True):
      parts += [jax.device_put(piece, device) for device in devices]
  return tuple(
    jax.make_array_from_single_device_arrays(shape, sharding, parts)
    for shape, parts in zip(shapes, arrays, strict=True)
  )


def _pieces(
  shape: Shape, sharding: NamedSharding
) -> Iterator[tuple[Index, list[jax.Device]]]:
  """Yields each piece that is held here with the devices that hold it."""
  holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
  placed = sharding.addressable_devices_indices_map(shape)
  for device, index in placed.items():
    bounds = (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    holders.setdefault(tuple(bounds), []).append(device)
  for bounds, devices in holders.items():
    yield tuple(slice(*pair) for pair in bounds), devices


def _quantize(
  leaf: StoredLeaf, spec: QuantSpec, index: Index
) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes and absmax of the kernel's blocks at an index of them."""
  *stacked, blocks, outputs = index
  size = spec.block_size
  inputs = slice(blocks.start * size, min(blocks.stop * size, leaf.shape[-2]))
  found: tuple[np.ndarray, np.ndarray] | None = None
  count = len(range(leaf.shape[0])[stacked[0]]) if stacked else 1
  for i, layer in enumerate(leaf.layers((*stacked, inputs, outputs))):
    parts = _blocks(layer, spec)
    if not stacked:
      return parts
    if found is None:
      found = tuple(np.empty((count, *x.shape), x.dtype) for x in parts)
    for array, part in zip(found, parts, strict=True):
      array[i] = part
  return found


def _blocks(
  kernel: np.ndarray, spec: QuantSpec
) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes and absmax of a kernel [in, out], or of each of several."""
  if kernel.ndim == 2:
    codes, absmax = quantize_blocks(kernel, spec)
    return np.asarray(codes), np.asarray(absmax)
  codes, absmax = zip(*(_blocks(x, spec) for x in kernel), strict=True)
  return np.stack(codes), np.stack(absmax)


@functools.cache
def _nest(
  shardings: tuple[NamedSharding, ...] | None,
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
  """Returns what quantizes absmax [..., in / block, out] in turn."""

  def one(absmax: jax.Array) -> tuple[jax.Array, ...]:
    if shardings:  # whole on each device: a sum of parts rounds otherwise
      everywhere = NamedSharding(shardings[0].mesh, PartitionSpec())
      absmax = jax.lax.with_sharding_constraint(absmax, everywhere)
    return quantize_absmax(absmax)

  def run(absmax: jax.Array) -> tuple[jax.Array, ...]:
    return one(absmax) if absmax.ndim == 2 else jax.lax.map(run, absmax)

  return jax.jit(run, out_shardings=shardings)
