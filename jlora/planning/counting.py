"""Bytes of a step, counted from shapes where no compiler is at hand.

At its peak a step is in the backward pass of one layer: it holds what is kept
between steps, the gradients, every layer's input, and the layer that is
computed again. Of that layer, `LIVE` says how many arrays of each kind are
there at once. The numbers were read off the compilers' buffers, by making one
size at a time larger; what they leave out is what `planner` finds.
"""

import dataclasses
import math
from typing import Any

import jax

from jlora.core.quantized import is_quantized
from jlora.core.tree import leaves_by_path
from jlora.models.config import DecoderConfig
from jlora.training.halves import Halves
from jlora.training.run_spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Live:
  """Arrays that a layer's backward pass holds at once.

  Attributes:
    moments: (attention weights in float32, [tokens, mlp] arrays) at the
      moments that may be the largest: within attention, and within the MLP.
    embed: [tokens, embed] arrays.
    heads: [tokens, heads] arrays.
    dense: Kernels of a layer, in layers, where they are stored dense: slices
      of the stack are copies.
    decoded: Likewise where they are quantized.
    indices: Decoded copies of the largest kernel beside these.
    codes: Copies of all codes of the base, in another layout.
  """

  moments: tuple[tuple[float, float], ...]
  embed: float
  heads: float
  dense: float
  decoded: float
  indices: float
  codes: float = 0.0


LIVE = {
  # Kernels are copied for the product; all of a layer are there together.
  'cpu': Live(((3, 9),), 6, 4, 1, 1, 1),
  # Products and their neighbors are fused, and codes decoded one by one.
  'cuda': Live(((2.2, 1), (1, 5)), 4, 4, 0.85, 0.25, 1),
  # Codes are decoded by selects in int32 and float32, two bytes each for one
  # of bfloat16, four of them at once; the loop over layers reads all codes in
  # other tiles than those they arrive in.
  'tpu': Live(((2, 3),), 4, 2, 0.85, 0, 8.5, codes=1),
}
_LOGITS = 2  # float32 [chunk, vocab]: the logits and their gradient


def count_gradients(spec: RunSpec, trainable: int) -> int:
  """Returns the bytes of gradients on a device.

  Args:
    spec: The run; between microbatches there is a sum besides.
    trainable: Bytes of what is trained.
  """
  return trainable * (2 if spec.train.accumulate > 1 else 1)


def count_inputs(spec: RunSpec, config: DecoderConfig, halves: Halves) -> int:
  """Returns the bytes that all layers keep for the backward pass on a device.

  Args:
    spec: The run; 'full' keeps a layer's input, 'dots' the results of linear
      layers too, 'none' also what lies between them.
    config: The base's sizes.
    halves: The run's parameters, as arrays or shapes.
  """
  c, size = config, halves.dtype.itemsize
  mesh = halves.shardings.mesh.shape
  rows = _rows(spec, mesh)
  tokens = rows * spec.data.max_length
  cut = mesh['tensor']
  widths = c.embed_dim * cut
  if spec.train.remat != 'full':
    shared = (c.heads + 2 * c.kv_heads) * c.head_dim + 2 * c.mlp_dim
    widths += shared + 2 * c.embed_dim * cut
  if spec.train.remat == 'none':
    widths += 2 * c.mlp_dim + 2 * c.heads * c.head_dim + 2 * c.embed_dim * cut
    widths += c.heads * spec.data.max_length  # attention weights
  return c.layers * tokens * widths // cut * size


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
  rows, length = _rows(spec, mesh), spec.data.max_length
  tokens, cut = rows * length, mesh['tensor']
  scores = 4 * tokens * length * c.heads // cut
  inner = size * tokens * c.mlp_dim // cut
  layer = max(s * scores + f * inner for s, f in live.moments)
  layer += size * tokens * live.embed * c.embed_dim
  layer += size * tokens * live.heads * c.heads * c.head_dim // cut
  layer += _kernels(config, halves, live) / cut
  chunk = rows * min(max(spec.train.loss_chunk // rows, 1), length)
  logits = _LOGITS * 4 * chunk * c.vocab_size
  gradients = sum(_bytes(x) for x in jax.tree.leaves(halves.state.trainable))
  return int(max(layer, logits - gradients))


def _rows(spec: RunSpec, mesh: Any) -> int:
  """Returns the rows of a microbatch on one device."""
  devices = mesh['data'] * mesh['fsdp']
  return spec.train.batch_size // spec.train.accumulate // devices


def _kernels(config: DecoderConfig, halves: Halves, live: Live) -> float:
  """Returns the bytes of one layer's kernels, whole, as they are used."""
  leaves = leaves_by_path(halves.frozen, is_quantized)
  sizes = {True: [0], False: [0]}  # by whether they are quantized
  codes = 0
  for path, leaf in leaves.items():
    if path.startswith('layers/') and len(leaf.shape) == 3:
      count = math.prod(leaf.shape[1:])
      sizes[is_quantized(leaf)].append(count * halves.dtype.itemsize)
    if is_quantized(leaf):
      codes += _bytes(leaf.codes)
  quantized = live.decoded * sum(sizes[True]) + live.indices * max(sizes[True])
  return live.dense * sum(sizes[False]) + quantized + live.codes * codes


def _bytes(array: Any) -> int:
  """Returns the bytes of an array on one device."""
  shape = array.sharding.shard_shape(array.shape)
  return math.prod(shape) * array.dtype.itemsize
