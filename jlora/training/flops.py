"""Floating-point operations of training, and how well devices are used.

With P weights of the frozen base that multiply every token and R adapter
weights, a model takes 4 P + 6 R operations a token: two a weight forward, two
for the gradient of its input, and two more for the weight's own where it is
trained, so that full fine-tuning takes 6 P. What a program recomputes or
decodes is not in it, nor is padding. The output head counts for every token,
though its products are made for chunks with a trained token only; what the
hardware computes is counted as if all chunks had one.

References:
  Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, appendix B.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jlora.core.tree import nodes_by_path
from jlora.models import layout
from jlora.models.config import DecoderConfig
from jlora.parallel.peaks import peak_flops
from jlora.training.halves import Halves
from jlora.training.traced import count_flops


@dataclasses.dataclass(frozen=True)
class Work:
  """What the updates of a run compute.

  Attributes:
    frozen: P: weights of all frozen kernels and of the head; of experts, those
      that a token meets.
    trained: R, likewise: weights of adapters, or of kernels trained whole.
    attention: A token's operations in products of queries, keys and values,
      12 L D S over rows of S tokens as if each saw all of them (local layers:
      their window), in L layers of D = heads × head_dim.
    places: Tokens of an update whose rows are full.
    hardware: Operations of all matrix products of an update as it is traced,
      of all devices together: places that are empty, what is recomputed for
      the backward pass and masked attention are in it.
    peak: Operations a second that all devices could do; None where that is
      not known.
  """

  frozen: int
  trained: int
  attention: int
  places: int
  hardware: int
  peak: float | None = None

  @property
  def per_token(self) -> int:
    """The model's operations a token, 4 P + 6 R; attention is not in it."""
    return 4 * self.frozen + 6 * self.trained

  @property
  def numerator(self) -> str:
    """What `per_token` is made of."""
    terms = {4: self.frozen, 6: self.trained}
    return ' + '.join(f'{n} × {x:,}' for n, x in terms.items() if x)

  def rows(self) -> Iterator[tuple[str, str]]:
    """Yields the lines of the table that is printed before the first step."""
    formula = '4 P + 6 R' if self.frozen else '6 R'
    model = _giga(self.per_token * self.places)
    yield f'model FLOPs, {formula} a token', model
    yield 'attention besides', _giga(self.attention * self.places)
    yield 'hardware FLOPs', _giga(self.hardware)

  def fields(self, tokens_per_s: float | None) -> dict[str, Any]:
    """Returns the entry of summary.json.

    Args:
      tokens_per_s: Of the run, padding left out; None where no step was made.
    """
    rate = None if tokens_per_s is None else self.per_token * tokens_per_s
    used = rate / self.peak if rate is not None and self.peak else None
    return {
      'model_per_token': self.per_token,
      'numerator': self.numerator,
      'attention_per_token': self.attention,
      'hardware_per_step': self.hardware,
      'model_per_s': rate,
      'peak_per_s': self.peak,
      'mfu': used,
    }

  def sentence(self, tokens_per_s: float) -> str:
    """Returns how fast a run was, for people to read.

    Args:
      tokens_per_s: Of the run, padding left out.
    """
    found = self.fields(tokens_per_s)
    text = f'{tokens_per_s:,.0f} tokens/s, {_giga(found["model_per_s"])}/s'
    if found['mfu'] is None:
      return f'{text} of the model'
    return f'{text} of the model: MFU {found["mfu"]:.1%} of the bfloat16 peak'


def _giga(count: float) -> str:
  return f'{count / 1e9:,.4g} GFLOPs'


def work_of(
  config: DecoderConfig, halves: Halves, jaxpr: Any, shape: tuple[int, int]
) -> Work:
  """Returns the operations of a run's updates.

  Args:
    config: The base's sizes.
    halves: The run's parameters, as arrays or as shapes.
    jaxpr: Of its traced step.
    shape: Rows of a batch, and places of a row.
  """
  return count_work(
    config,
    halves.state.trainable,
    shape=shape,
    hardware=count_flops(jaxpr),
    peak=peak_flops(halves.shardings.mesh.devices.flat, halves.dtype),
  )


def count_work(
  config: DecoderConfig,
  trainable: Any,
  *,
  shape: tuple[int, int],
  hardware: int,
  peak: float | None = None,
) -> Work:
  """Counts the operations of updates that are known by their parts.

  Args:
    config: The base's sizes.
    trainable: The trained half of the parameters, or its shapes. Zeros that
      pad the ranks within a stack count.
    shape: Rows of a batch, and places of a row.
    hardware: From `count_flops`.
    peak: Operations a second of all devices together.
  """
  nodes = nodes_by_path(trainable)
  frozen = trained = 0.0
  for path, weight in layout.by_path(config).items():
    if not (weight.linear or path == layout.head_path(config)):
      continue
    experts = '/experts/' in path
    met = config.experts_per_token / config.experts if experts else 1
    node = nodes.get(path, {})
    size = met * math.prod(weight.shape)
    if 'full' in node:
      trained += size
    else:
      frozen += size
    trained += met * sum(node[name].size for name in ('a', 'b') if name in node)
  rows, length = shape
  return Work(
    frozen=round(frozen),
    trained=round(trained),
    attention=_attention(config, length),
    places=rows * length,
    hardware=hardware,
    peak=peak,
  )


def _attention(config: DecoderConfig, length: int) -> int:
  """Returns a token's operations in attention over rows of some length."""
  window = min(config.sliding_window or length, length)
  local = len(config.local_layers)
  seen = local * window + (config.layers - local) * length
  return 12 * config.heads * config.head_dim * seen
