"""Bytes of a step, counted from shapes where no compiler is at hand.

At its peak a step is in the backward pass of one layer: it holds what is kept
between steps, the gradients, what all layers kept, and what this one computes.
Of that, `LIVE` says how many arrays of each kind are there at once. The numbers
are fitted to steps that were compiled; what they leave out is what `planner`
finds.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from jlora.core.quantized import is_quantized
from jlora.core.tree import leaves_by_path
from jlora.models.blockwise import Sight
from jlora.models.config import DecoderConfig
from jlora.models.kernels import kernel_for
from jlora.models.layout import head_path
from jlora.models.reach import kinds_of, reach_of
from jlora.models.tiles import make_tiling
from jlora.training.halves import Halves
from jlora.training.run_spec import RunSpec


class Moment(NamedTuple):
  """A moment of a layer's backward pass that may be the largest.

  Attributes:
    scores: Attention scores in float32, those of a tile. The kernels of GPUs
      and TPUs hold none.
    inner: [tokens, mlp] arrays.
    kernels: Share of the layer's decoded or copied kernels.
  """

  scores: float
  inner: float
  kernels: float = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Live:
  """Arrays that a layer's backward pass holds at once.

  Attributes:
    attention: Within attention.
    mlp: Within the MLP.
    embed: [tokens, embed] arrays.
    heads: [tokens, heads] arrays.
    dense: Kernels of a layer, in layers, where they are stored dense: slices
      of the stack are copies.
    decoded: Likewise where they are quantized.
    largest: Decoded copies of the largest kernel beside these.
    logits: float32 [chunk, vocab] arrays, when the loss of a frozen head is
      computed; of a trained one there are two at least.
    inputs: Copies of all layers' inputs.
  """

  attention: Moment
  mlp: Moment
  embed: float
  heads: float
  dense: float
  decoded: float
  largest: float
  logits: float = 2
  inputs: float = 0


LIVE = {
  # Kernels are copied for the product; all of a layer are there together.
  'cpu': Live(
    attention=Moment(3, 9),
    mlp=Moment(3, 9),
    embed=6,
    heads=4,
    dense=1,
    decoded=1,
    largest=1,
    logits=1,
  ),
  # Products and their neighbors are fused, and codes decoded one by one.
  'cuda': Live(
    attention=Moment(3.7, 1),
    mlp=Moment(1, 5),
    embed=4,
    heads=4,
    dense=0.85,
    decoded=0.25,
    largest=1,
  ),
  # The planes of a kernel are decoded apart, then interleaved.
  'tpu': Live(
    attention=Moment(3.7, 3, 0.5),
    mlp=Moment(0.7, 9),
    embed=4,
    heads=2,
    dense=0.85,
    decoded=0,
    largest=3.8,
    logits=4,
    inputs=1,
  ),
}


def count_gradients(spec: RunSpec, trainable: int) -> int:
  """Returns the bytes of gradients on a device.

  Args:
    spec: The run; between microbatches there is a sum besides.
    trainable: Bytes of what is trained.
  """
  return trainable * (2 if spec.train.accumulate > 1 else 1)


def count_scratch(
  spec: RunSpec, config: DecoderConfig, halves: Halves, platform: str
) -> int:
  """Returns the bytes that a step needs beside everything else on a device.

  Args:
    spec: The run.
    config: The base's sizes.
    halves: The run's parameters, as arrays or shapes.
    platform: 'cpu', 'cuda' or 'tpu'.
  """
  c, size, live = config, halves.dtype.itemsize, LIVE[platform]
  mesh = halves.shardings.mesh.shape
  rows = spec.train.rows(mesh['data'] * mesh['fsdp'])
  length = spec.data.max_length
  tokens, cut = rows * length, mesh['tensor']
  scores = _scores(spec, config, halves, platform)
  inner = size * tokens * c.mlp_dim // cut
  kernels = _kernels(config, halves, live) / cut
  layer = max(
    at.scores * scores + at.inner * inner + at.kernels * kernels
    for at in (live.attention, live.mlp)
  )
  layer += size * tokens * live.embed * c.embed_dim
  layer += size * tokens * live.heads * c.heads * c.head_dim // cut
  chunk = rows * min(max(spec.train.loss_chunk // rows, 1), length)
  head, gradients = _of_head(config, halves.state.trainable)
  arrays = max(live.logits, 2) if head else live.logits
  logits = arrays * 4 * chunk * c.vocab_size / cut
  # Gradients are not there yet, but for the head's, beside its part of a chunk.
  logits += 2 * head - gradients
  inputs = live.inputs * size * c.layers * tokens * c.embed_dim
  return int(max(layer, logits) + inputs)


def _of_head(config: DecoderConfig, trainable: Any) -> tuple[int, int]:
  """Returns the trained bytes of the head, and of all."""
  sizes = {path: _bytes(x) for path, x in leaves_by_path(trainable).items()}
  head = f'{head_path(config)}/'
  of_head = sum(size for p, size in sizes.items() if p.startswith(head))
  return of_head, sum(sizes.values())


def _scores(
  spec: RunSpec, config: DecoderConfig, halves: Halves, platform: str
) -> int:
  """Returns the bytes of a tile's scores on a device; 0 by a kernel."""
  c, mesh, length = config, halves.shardings.mesh, spec.data.max_length
  devices = mesh.shape['data'] * mesh.shape['fsdp']
  rows = spec.train.rows(devices)
  q_BSHD, k_BSKD = (
    jax.ShapeDtypeStruct((rows * devices, length, n, c.head_dim), halves.dtype)
    for n in (c.heads, c.kv_heads)
  )
  segments = jax.ShapeDtypeStruct((rows * devices, length), 'int32')
  sight = Sight(
    segments if spec.data.pack else None,
    reach_of(c, kinds_of(c).local, length),
  )
  found = kernel_for(platform, mesh, q_BSHD, k_BSKD, sight, c.attention_cap)
  if found is not None and spec.train.attention == 'auto':
    return 0
  scores = make_tiling(length, None).scores
  return 4 * rows * scores * c.heads // mesh.shape['tensor']


def _kernels(config: DecoderConfig, halves: Halves, live: Live) -> float:
  """Returns the bytes of one layer's kernels, whole, as they are used."""
  leaves = leaves_by_path(halves.frozen, is_quantized)
  sizes = {True: [0], False: [0]}  # by whether they are quantized
  for path, leaf in leaves.items():
    if path.startswith('layers/') and len(leaf.shape) > 2:
      count = math.prod(leaf.shape[1:])
      sizes[is_quantized(leaf)].append(count * halves.dtype.itemsize)
  quantized = live.decoded * sum(sizes[True]) + live.largest * max(sizes[True])
  return live.dense * sum(sizes[False]) + quantized


def _bytes(array: Any) -> int:
  """Returns the bytes of an array on one device."""
  shape = array.sharding.shard_shape(array.shape)
  return math.prod(shape) * array.dtype.itemsize
