"""What a training step reads."""

import dataclasses
import functools

import jax


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(
    'tokens',
    'targets',
    'loss_mask',
    'segment_ids',
    'positions',
  ),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed sequences, every field [batch, length].

  Attributes:
    tokens: int32 token ids.
    targets: int32; the next token of the same segment.
    loss_mask: float32; 1 where predicting the target is trained.
    segment_ids: int32; one id an example in each row, 0 is padding.
    positions: int32; count from zero in every segment.
  """

  tokens: jax.Array
  targets: jax.Array
  loss_mask: jax.Array
  segment_ids: jax.Array
  positions: jax.Array
