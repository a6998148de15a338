"""What training carries from one step to the next."""

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('step', 'trainable', 'opt_state'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state of a run: everything that a step changes, and nothing frozen.

  Attributes:
    step: int32 scalar, updates so far.
    trainable: The trained half of the parameters, from `partition`.
    opt_state: The optimizer's state over `trainable`.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any
