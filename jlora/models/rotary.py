"""Rotary position embeddings in the rotate-half layout of Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.config import DecoderConfig
from jlora.models.rope_scaling import ByLength


def frequencies(config: DecoderConfig) -> np.ndarray:
  """Returns the angle a position adds to each pair of features.

  Args:
    config: Gives `head_dim`, `rotary_share`, `rope_theta` and `rope_scaling`,
      which must not depend on the sequence.

  Returns:
    float32 [pairs], in radians a position; half the features that are rotated.

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
  size = int(config.head_dim * config.rotary_share)
  return np.arange(0, size, 2, dtype=np.float32) / np.float32(size)


def angles(
  positions: jax.Array,
  config: DecoderConfig,
  length: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines that `rotate` needs.

  Args:
    positions: int [batch, length], starting at zero in each sequence.
    config: The decoder's.
    length: Of the longest sequence, where a stretch depends on it; None is
      the one of `positions`.

  Returns:
    Two float32 arrays [batch, length, 1, pairs]; the third axis is for
    the heads.
  """
  scaling = config.rope_scaling
  if isinstance(scaling, ByLength):
    length = positions.max() + 1 if length is None else length
    speeds = scaling.frequencies(_exponents(config), config.rope_theta, length)
  else:
    speeds = frequencies(config)
  turns = positions[..., None].astype(jnp.float32) * speeds[None, None]
  cos, sin = jnp.cos(turns)[:, :, None], jnp.sin(turns)[:, :, None]
  if scaling is not None and scaling.amplitude != 1:
    cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
  return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns each pair of features (i, i + pairs) by its angle.

  Args:
    x: [batch, length, heads, head_dim] queries or keys.
    cos: From `angles`.
    sin: From `angles`.

  Returns:
    Like `x`, in its dtype. Features beyond the pairs are kept.
  """
  pairs = cos.shape[-1]
  first, second, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
  cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
  )
