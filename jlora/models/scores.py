"""What becomes of attention scores before the softmax."""

import jax
import jax.numpy as jnp


def capped(x: jax.Array, cap: float | None) -> jax.Array:
  """Returns cap * tanh(x / cap), between -cap and cap; `x` without a cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)
