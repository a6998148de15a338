"""Rotary position embeddings in the rotate-half layout of Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.config import DecoderConfig
from jlora.models.rope_scaling import DynamicScaling, YarnScaling


def frequencies(config: DecoderConfig) -> np.ndarray:
  """Returns the angle a position adds to each pair of features.

  Args:
    config: Gives `head_dim`, `rope_theta` and `rope_scaling`, which must not
      depend on the sequence.

  Returns:
    float32 [head_dim / 2], in radians a position.

  References:
    Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, equation 15.
  """
  # Rounded where torch rounds, so that no bit differs from transformers'.
  powers = config.rope_theta ** _exponents(config).astype(np.float64)
  plain = np.float32(1) / powers.astype(np.float32)
  if config.rope_scaling is None:
    return plain
  return config.rope_scaling.stretch(plain, config.rope_theta)


def _exponents(config: DecoderConfig) -> np.ndarray:
  """Returns the powers of `rope_theta` in the wavelengths."""
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float32)
  return exponents / np.float32(config.head_dim)


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
  scaling = config.rope_scaling
  if isinstance(scaling, DynamicScaling):
    speeds = scaling.frequencies(
      _exponents(config), config.rope_theta, positions
    )
  else:
    speeds = frequencies(config)
  turns = positions[..., None].astype(jnp.float32) * speeds[None, None]
  cos, sin = jnp.cos(turns)[:, :, None], jnp.sin(turns)[:, :, None]
  if isinstance(scaling, YarnScaling):
    cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
  return cos, sin


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
