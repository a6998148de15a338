"""Attention by the kernels that JAX has for GPUs and TPUs.

Each takes what it can, said by `_kernel_for`; `attend_blockwise` takes the
rest. On a GPU cuDNN has no segments without a mask of length^2, so packed rows
go to the Triton kernel. None holds all scores of a sequence. What cuDNN and
Triton keep for their backward passes has no name that a remat policy could ask
for: with 'dots' they attend again.

Dimension key: B batch, S queries and keys, H query heads, K key-value heads, G
query heads a key-value head, D head_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jlora.models.blockwise import KEPT, Sight, attend_blockwise

# (q_BSHD, k_BSKD, v_BSKD, sight, scale=, cap=) -> [batch, length, H * D]
Attend = Callable[..., jax.Array]

_AMPERE = 8.0  # its compute capability
_HALF = (jnp.bfloat16, jnp.float16)
_TRITON_BLOCK, _SPLASH_BLOCKS = 64, (512, 256, 128)
_WIDEST = {'cudnn': 128, 'triton': 128}  # head_dim; cuDNN has 256 on few GPUs


def make_attend(mesh: Any) -> Attend:
  """Returns the attention that suits the devices of a mesh.

  Args:
    mesh: The devices, with the axes 'data', 'fsdp' and 'tensor'. They need not
      be here.
  """
  devices = getattr(mesh, 'devices', None)  # an AbstractMesh has none
  if devices is None or not _has_kernels(devices.flat[0]):
    return attend_blockwise
  return functools.partial(_attend, devices.flat[0].platform, mesh)


def _has_kernels(device: Any) -> bool:
  """Returns whether a device runs any; GPUs of NVIDIA do from Ampere on."""
  if device.platform in ('cpu', 'tpu'):
    return device.platform == 'tpu'
  # Of AMD's it is a name, and devices that are not here may have none.
  capability = getattr(device, 'compute_capability', None) or str(_AMPERE)
  return capability[:1].isdigit() and float(capability) >= _AMPERE


def _attend(
  platform: str,
  mesh: Any,
  q_BSHD: jax.Array,
  k_BSKD: jax.Array,
  v_BSKD: jax.Array,
  sight: Sight,
  *,
  scale: float | None = None,
  cap: float | None = None,
) -> jax.Array:
  """Attends as `attend_blockwise` does, by a kernel where one can."""
  scale = q_BSHD.shape[-1] ** -0.5 if scale is None else scale
  kernel = kernel_for(platform, mesh, q_BSHD, k_BSKD, sight, cap)
  if kernel is None:
    return attend_blockwise(q_BSHD, k_BSKD, v_BSKD, sight, scale=scale, cap=cap)
  run = functools.partial(kernel, reach=sight.reach, scale=scale, cap=cap)
  if mesh.size > 1:  # a kernel is not cut by the compiler
    cut, ids = P(('data', 'fsdp'), None, 'tensor'), P(('data', 'fsdp'))
    run = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(cut, cut, cut, ids),
      out_specs=cut,
      check_vma=False,
    )
  out_BSHD = run(q_BSHD, k_BSKD, v_BSKD, sight.segments)
  return out_BSHD.reshape(*q_BSHD.shape[:2], -1)


def kernel_for(
  platform: str,
  mesh: Any,
  q_BSHD: Any,
  k_BSKD: Any,
  sight: Sight,
  cap: float | None,
) -> Callable[..., jax.Array] | None:
  """Returns the kernel that attends on a mesh; None where tiles do.

  Args:
    platform: 'cpu', 'cuda' or 'tpu'.
    mesh: As for `make_attend`, or its shape alone.
    q_BSHD: Queries of all devices, or their shape and dtype.
    k_BSKD: Keys, likewise.
    sight: What a query sees.
    cap: Of the scores, as in `capped`.
  """
  rows, heads = mesh.shape['data'] * mesh.shape['fsdp'], mesh.shape['tensor']
  fits = q_BSHD.shape[0] % rows == 0 and k_BSKD.shape[2] % heads == 0
  if platform == 'cpu' or not fits:
    return None
  return _kernel_for(platform, q_BSHD, sight, cap)


def _kernel_for(
  platform: str, q_BSHD: jax.Array, sight: Sight, cap: float | None
) -> Callable[..., jax.Array] | None:
  """Returns the kernel that takes such operands; None where none does."""
  width, half = q_BSHD.shape[-1], q_BSHD.dtype in _HALF
  if isinstance(sight.reach, jax.Array):  # of some layers only
    return None
  if platform == 'tpu':
    return splash
  if cap is not None or not half or width % 8:
    return None
  if sight.segments is None:
    return cudnn if width <= _WIDEST['cudnn'] else None
  known = sight.reach is None and width <= _WIDEST['triton']
  return triton if known else None


def cudnn(
  q_BSHD: jax.Array,
  k_BSKD: jax.Array,
  v_BSKD: jax.Array,
  segments: None,
  *,
  reach: int | None,
  scale: float,
  cap: None = None,
) -> jax.Array:
  """Attends by cuDNN: rows of one segment, in 16 bits.

  Args:
    q_BSHD: Queries.
    k_BSKD: Keys.
    v_BSKD: Values.
    segments: None.
    reach: How many tokens a token sees, itself among them; None for all.
    scale: What scores are multiplied by.
    cap: None.

  Returns:
    In the shape of the queries.
  """
  del segments, cap
  window = None if reach is None else (reach - 1, 0)
  return jax.nn.dot_product_attention(
    q_BSHD,
    k_BSKD,
    v_BSKD,
    scale=scale,
    is_causal=True,
    local_window_size=window,
    implementation='cudnn',
  )


def triton(
  q_BSHD: jax.Array,
  k_BSKD: jax.Array,
  v_BSKD: jax.Array,
  segments: jax.Array,
  *,
  reach: None = None,
  scale: float,
  cap: None = None,
  interpret: bool = False,
) -> jax.Array:
  """Attends by JAX's Triton kernel: packed rows, in 16 bits.

  Args:
    q_BSHD: Queries.
    k_BSKD: Keys; a head is repeated for every query head of its group.
    v_BSKD: Values, likewise.
    segments: int [batch, length].
    reach: None.
    scale: What scores are multiplied by.
    cap: None.
    interpret: Whether it is run without a GPU.

  Returns:
    In the shape of the queries.
  """
  from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

  del reach, cap
  S, H = q_BSHD.shape[1:3]
  k_BSHD, v_BSHD = (
    jnp.repeat(x, H // x.shape[2], axis=2) for x in (k_BSKD, v_BSKD)
  )
  operands = _padded(_TRITON_BLOCK, q_BSHD, k_BSHD, v_BSHD, segments)
  out_BSHD = mha(
    *operands,
    sm_scale=scale,
    causal=True,
    block_sizes=BlockSizes(*[_TRITON_BLOCK] * 6),
    interpret=interpret,
  )
  return out_BSHD[:, :S]


def splash(
  q_BSHD: jax.Array,
  k_BSKD: jax.Array,
  v_BSKD: jax.Array,
  segments: jax.Array | None,
  *,
  reach: int | None,
  scale: float,
  cap: float | None,
  interpret: bool = False,
) -> jax.Array:
  """Attends by JAX's splash attention on a TPU.

  Args:
    q_BSHD: Queries.
    k_BSKD: Keys.
    v_BSKD: Values.
    segments: int [batch, length], or None for one segment.
    reach: How many tokens a token sees, itself among them; None for all.
    scale: What scores are multiplied by.
    cap: Of the scores, as in `capped`; None leaves them.
    interpret: Whether it is run without a TPU.

  Returns:
    In the shape of the queries.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  B, S, H, D = q_BSHD.shape
  K = k_BSKD.shape[2]
  q_BSHD, k_BSKD, v_BSKD, segments = _padded(
    _SPLASH_BLOCKS[-1], q_BSHD * scale, k_BSKD, v_BSKD, segments
  )
  length = q_BSHD.shape[1]
  mask = masks.CausalMask((length, length))
  if reach is not None:
    mask = masks.LocalMask((length, length), (reach - 1, 0), 0)
  block = next(b for b in _SPLASH_BLOCKS if length % b == 0)
  kernel = kernels.make_splash_mqa_single_device(
    masks.MultiHeadMask([mask] * (H // K)),
    block_sizes=kernels.BlockSizes(*[block] * 8),
    attn_logits_soft_cap=cap,
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )

  def row(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> jax.Array:
    ids = ids if ids is None else kernels.SegmentIds(ids, ids)
    return jax.vmap(kernel, (0, 0, 0, None))(q, k, v, ids)

  q_BKGSD = q_BSHD.reshape(B, length, K, H // K, D).transpose(0, 2, 3, 1, 4)
  k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k_BSKD, v_BSKD))
  out_BKGSD = jax.vmap(row)(q_BKGSD, k_BKSD, v_BKSD, segments)
  out = out_BKGSD.transpose(0, 3, 1, 2, 4).reshape(B, length, H, D)
  return out[:, :S].astype(v_BSKD.dtype)


def _padded(block: int, *arrays: Any) -> list[Any]:
  """Returns arrays [batch, length, …] that are long by a multiple of `block`.

  What is added comes last, where no other token sees it.
  """
  length = arrays[0].shape[1]
  extra = math.ceil(length / block) * block - length

  def pad(x: Any) -> Any:
    if x is None or not extra:
      return x
    widths = [(0, extra if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, mode='edge')

  return [pad(x) for x in arrays]
