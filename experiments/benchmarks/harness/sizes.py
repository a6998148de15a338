"""What a step must compute, whoever computes it."""

from collections.abc import Iterator

from jlora.models import layout
from jlora.models.config import DecoderConfig


def kernels(config: DecoderConfig) -> Iterator[tuple[int, int, int]]:
  """Yields sizes in and out of the linear layers, and how many have them.

  Args:
    config: The decoder's sizes.
  """
  for weight in layout.weights(config):
    if weight.linear and weight.stacked:
      *stack, rows, columns = weight.shape
      count = 1
      for size in stack:
        count *= size
      yield rows, columns, count


def model_flops(
  config: DecoderConfig, batch: int, length: int, rank: int
) -> int:
  """Returns the operations of the products that a LoRA step cannot do without.

  For T tokens, P weights of linear layers and R of adapters: 4 P T, forward and
  for the gradient by the input; 6 R T; 4 T embed vocab for a frozen head; and
  12 T length heads head_dim for attention, whose masked half is counted too.

  Args:
    config: The decoder's sizes.
    batch: Rows.
    length: Tokens a row.
    rank: Of the adapters.
  """
  tokens, found = batch * length, 0
  for rows, columns, count in kernels(config):
    found += count * (4 * rows * columns + 6 * rank * (rows + columns))
  found += 4 * config.embed_dim * config.vocab_size
  heads = config.heads * config.head_dim
  return tokens * (found + 12 * config.layers * length * heads)
