"""AdamW over the trained half of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.core.combination import labels
from jlora.errors import ConfigError
from jlora.training.adam_8bit import scale_by_adam_8bit

SCHEDULES = ('constant', 'cosine')
_NOT_DECAYED = ('scale', 'bias', 'magnitude')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimSpec:
  """The optimizer of a run.

  Attributes:
    learning_rate: Peak learning rate.
    schedule: 'constant', or 'cosine', which would reach zero one step after
      the last.
    warmup: Steps of linear warmup from zero.
    weight_decay: Decoupled weight decay; none on norms, biases, magnitudes.
    clip: Largest global norm of a gradient; 0 for no clipping.
    b1: Decay of Adam's first moment.
    b2: Decay of Adam's second moment.
    eps: Added to the root of Adam's second moment.
    moment_bits: 32, or 8 for moments that are quantized in blocks.
    offload: Whether the moments lie in the hosts' memory between the updates,
      which bring them to the devices.
    lora_plus: Learning rate of the adapters' `b` over that of all else; LoRA+
      takes 16.

  References:
    Hayou et al., `LoRA+ <https://arxiv.org/abs/2402.12354>`_.
  """

  learning_rate: float = 2e-4
  schedule: str = 'cosine'
  warmup: int = 0
  weight_decay: float = 0.0
  clip: float = 1.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  moment_bits: int = 32
  offload: bool = False
  lora_plus: float = 1.0

  def __post_init__(self) -> None:
    """Checks the fields."""
    rate, inf = self.learning_rate, float('inf')
    self._require(
      'learning_rate', 0 < rate < inf, 'above 0 and finite, such as 2e-4'
    )
    if self.schedule not in SCHEDULES:
      known = ', '.join(map(repr, SCHEDULES))
      raise ConfigError(f'optim.schedule {self.schedule!r} is none of {known}')
    for field in ('warmup', 'weight_decay', 'clip'):
      self._require(field, 0 <= getattr(self, field) < inf, '0 or more')
    for field in ('b1', 'b2'):
      self._require(field, 0 <= getattr(self, field) < 1, 'in [0, 1)')
    self._require('eps', 0 < self.eps < inf, 'above 0')
    self._require('moment_bits', self.moment_bits in (8, 32), '8 or 32')
    ratio = 0 < self.lora_plus < inf
    self._require('lora_plus', ratio, 'above 0 and finite, such as 16')

  def _require(self, field: str, holds: bool, wanted: str) -> None:
    if not holds:
      raise ConfigError(
        f'optim.{field} is {getattr(self, field)}; it must be {wanted}'
      )


def make_schedule(spec: OptimSpec, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step, from 0.

  Args:
    spec: Peak, shape and warmup.
    steps: Steps of the whole run.
  """
  warmup = min(spec.warmup, max(steps - 1, 0))
  rise = optax.linear_schedule(0.0, spec.learning_rate, warmup + 1)
  if spec.schedule == 'constant':
    rest = optax.constant_schedule(spec.learning_rate)
  else:
    rest = optax.cosine_decay_schedule(
      spec.learning_rate, max(steps - warmup, 1)
    )
  return optax.join_schedules(
    [lambda step: rise(step + 1), rest], boundaries=[warmup]
  )


def learning_rates(spec: OptimSpec, steps: int) -> np.ndarray:
  """Returns the learning rate of every step [steps].

  They are computed at once: asked for one, devices that are busy with an
  update would answer after it.

  Args:
    spec: Peak, shape and warmup.
    steps: Steps of the whole run.
  """
  return np.asarray(jax.vmap(make_schedule(spec, steps))(jnp.arange(steps)))


def make_optimizer(
  spec: OptimSpec, steps: int, trainable: Any
) -> optax.GradientTransformation:
  """Returns AdamW whose moments lie in groups by `labels(trainable)`.

  Args:
    spec: Learning rate, decay and clipping.
    steps: Steps of the whole run, for the schedule.
    trainable: From `jlora.partition`; only its structure is used.
  """
  groups = labels(trainable)
  scale_by_adam = optax.scale_by_adam
  if spec.moment_bits == 8:
    scale_by_adam = scale_by_adam_8bit
  adam = scale_by_adam(b1=spec.b1, b2=spec.b2, eps=spec.eps)
  present = sorted(set(jax.tree.leaves(groups)))
  ratios = {
    label: optax.scale(spec.lora_plus if label == 'b' else 1.0)
    for label in present
  }
  return optax.chain(
    optax.clip_by_global_norm(spec.clip) if spec.clip else optax.identity(),
    optax.partition(dict.fromkeys(present, adam), groups),
    optax.masked(
      optax.add_decayed_weights(spec.weight_decay), decay_mask(trainable)
    ),
    optax.scale_by_learning_rate(make_schedule(spec, steps)),
    optax.partition(ratios, groups),
  )


def decay_mask(trainable: Any) -> Any:
  """Returns True where weight decay acts: not on norms, biases, magnitudes.

  Args:
    trainable: From `jlora.partition`.
  """

  def decayed(path: tuple[Any, ...], _: Any) -> bool:
    names = {str(getattr(entry, 'key', entry)) for entry in path[-2:]}
    return names.isdisjoint(_NOT_DECAYED)

  return jax.tree_util.tree_map_with_path(decayed, trainable)
