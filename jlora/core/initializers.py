"""How an adapter starts."""

import math

import jax
import jax.numpy as jnp


def uniform_a(
  key: jax.Array, stacked: tuple[int, ...], size: int, rank: int
) -> jax.Array:
  """Returns U(-1/sqrt(in), 1/sqrt(in)), the default of PEFT.

  Args:
    key: PRNG key.
    stacked: Sizes of the stacked axes.
    size: `in` of the kernel; stacked axes do not count as fan-in.
    rank: Of the adapter.

  Returns:
    float32 [*stacked, size, rank].

  References:
    Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, section 4.1; the
    distribution is that of `reset_lora_parameters` in PEFT.
  """
  bound = 1 / math.sqrt(size)
  shape = (*stacked, size, rank)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
