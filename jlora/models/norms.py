"""The norms of decoders."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jlora.models.config import DecoderConfig


class RmsNormPlusOne(nn.Module):
  """RMSNorm whose scale is stored as its distance from one, as Gemma's is.

  Attributes:
    epsilon: Added to the mean square.
    dtype: Of the result.
  """

  epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes the last axis in float32."""
    scale = self.param('scale', nn.initializers.zeros, x.shape[-1:])
    x = x.astype(jnp.float32)
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(mean + self.epsilon)
    # In float32: near one, steps of bfloat16 are larger than what is stored.
    gain = 1 + scale.astype(jnp.float32)
    return (y * gain.reshape(*[1] * (x.ndim - 1), -1)).astype(self.dtype)


_KINDS = {
  'rms': nn.RMSNorm,
  'rms_plus_one': RmsNormPlusOne,
  'layer': nn.LayerNorm,
}


def make_norm(
  config: DecoderConfig, dtype: jnp.dtype, name: str | None = None
) -> nn.Module:
  """Returns the norm that a decoder uses everywhere.

  Args:
    config: The decoder's.
    dtype: Of the result.
    name: Of the module in its parent.
  """
  make = _KINDS[config.norm]
  return make(epsilon=config.norm_eps, dtype=dtype, name=name)
