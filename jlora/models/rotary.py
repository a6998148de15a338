"""Rotary position embeddings in the rotate-half layout of Hugging Face."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig) -> np.ndarray:
  """Returns the angle a position adds to each pair of features.

  Args:
    config: Gives `head_dim`, `rope_theta` and `rope_scaling`.

  Returns:
    float32 [head_dim / 2], in radians a position.

  References:
    Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, equation 15.
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32)
  exponents = exponents / np.float32(config.head_dim)
  # Rounded where torch rounds, so that no bit differs from transformers'.
  powers = config.rope_theta ** exponents.astype(np.float64)
  plain = np.float32(1) / powers.astype(np.float32)
  if config.rope_scaling is None:
    return plain
  return _stretch(plain, config.rope_scaling)


def _stretch(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Lowers the slow frequencies by `factor`, interpolating in between."""
  wavelengths = 2 * math.pi / plain
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = (scaling.original_max_positions / wavelengths - low) / (high - low)
  kept = np.clip(kept, 0.0, 1.0)
  stretched = (1 - kept) * plain / scaling.factor + kept * plain
  return stretched.astype(np.float32)


def angles(
  positions: jax.Array, config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines that `rotate` needs.

  Args:
    positions: int [batch, length], starting at zero in each sequence.
    config: The decoder's.

  Returns:
    Two float32 arrays [batch, length, 1, head_dim / 2]; the third axis is for
    the heads.
  """
  turns = (
    positions[..., None].astype(jnp.float32) * frequencies(config)[None, None]
  )
  return jnp.cos(turns)[:, :, None], jnp.sin(turns)[:, :, None]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns each pair of features (i, i + head_dim / 2) by its angle.

  Args:
    x: [batch, length, heads, head_dim] queries or keys.
    cos: From `angles`.
    sin: From `angles`.

  Returns:
    Like `x`, in its dtype.
  """
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
