"""Stretches of the rotary wavelengths, for contexts beyond those of training.

Most take the frequencies of plain rotary embeddings, float32 [pairs] in radians
a position, to those that are used; two need to know how long the sequences are.
The names are those of `rope_type` in transformers, whose
`modeling_rope_utils.py` computes the same.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
  """All wavelengths times `factor`.

  References:
    Chen et al., `Position Interpolation <https://arxiv.org/abs/2306.15595>`_.
  """

  KIND: ClassVar[str] = 'linear'
  amplitude: ClassVar[float] = 1.0

  factor: float

  def stretch(self, plain: np.ndarray, theta: float) -> np.ndarray:
    """Returns the frequencies that are used."""
    del theta
    return plain / np.float32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
  """A larger base of the wavelengths, by as much as a sequence is too long.

  References:
    `NTK-aware scaling <https://arxiv.org/abs/2309.00071>`_, section 3.1, with
    the factor of Peng et al.'s "dynamic" variant in section 3.3.
  """

  KIND: ClassVar[str] = 'dynamic'
  amplitude: ClassVar[float] = 1.0

  factor: float
  max_positions: int

  def frequencies(
    self, exponents: np.ndarray, theta: float, length: jax.Array | int
  ) -> jax.Array:
    """Returns the frequencies for the longest of several sequences.

    Args:
      exponents: float32 [pairs], of `theta` in the wavelengths.
      theta: Base of the wavelengths.
      length: int scalar; of the longest sequence.
    """
    length = jnp.maximum(length, self.max_positions)
    longer = self.factor * length / self.max_positions - (self.factor - 1)
    size = 2 * len(exponents)
    base = theta * longer ** (size / (size - 2))
    return 1 / base**exponents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Slow frequencies divided by `factor`, fast ones kept.

  Wavelengths above `original_max_positions / low_freq_factor` are multiplied by
  `factor`, those below `original_max_positions / high_freq_factor` are kept,
  and the ones between are interpolated.

  References:
    Llama Team, `The Llama 3 Herd of Models <https://arxiv.org/abs/2407.21783>`_,
    section 3.2.
  """

  KIND: ClassVar[str] = 'llama3'
  amplitude: ClassVar[float] = 1.0

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192

  def stretch(self, plain: np.ndarray, theta: float) -> np.ndarray:
    """Returns the frequencies that are used."""
    del theta
    wavelengths = 2 * math.pi / plain
    low, high = self.low_freq_factor, self.high_freq_factor
    kept = (self.original_max_positions / wavelengths - low) / (high - low)
    kept = np.clip(kept, 0.0, 1.0)
    stretched = (1 - kept) * plain / self.factor + kept * plain
    return stretched.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
  """Frequencies that turn seldom divided by `factor`, and sharper attention.

  Pairs that turn more than `beta_fast` times within the original context are
  kept, those that turn less than `beta_slow` times are divided, and the ones
  between are interpolated.

  Attributes:
    factor: Of the context's length.
    original_max_positions: Length of the original context.
    attention_factor: What cosines and sines are multiplied by; None follows
      from the factor, and from both `mscale` where they are given.
    beta_fast: See above.
    beta_slow: See above.
    mscale: Of DeepSeek's models.
    mscale_all_dim: Of DeepSeek's models.
    truncate: Whether the ends of the ramp are whole pairs.

  References:
    Peng et al., `YaRN <https://arxiv.org/abs/2309.00071>`_, sections 3.2, 3.4.
  """

  KIND: ClassVar[str] = 'yarn'

  factor: float
  original_max_positions: int
  attention_factor: float | None = None
  beta_fast: float = 32
  beta_slow: float = 1
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def stretch(self, plain: np.ndarray, theta: float) -> np.ndarray:
    """Returns the frequencies that are used."""
    count = len(plain)
    ends = [
      self._pair(b, 2 * count, theta) for b in (self.beta_fast, self.beta_slow)
    ]
    if self.truncate:
      ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], 2 * count - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(count, dtype=np.float32) - low) / (high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    divided = plain / np.float32(self.factor)
    return (divided * (1 - kept) + plain * kept).astype(np.float32)

  def _pair(self, turns: float, size: int, theta: float) -> float:
    """Returns which pair turns so often within the original context."""
    wavelength = self.original_max_positions / turns / (2 * math.pi)
    return size * math.log(wavelength) / (2 * math.log(theta))

  @property
  def amplitude(self) -> float:
    """What cosines and sines are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
    return self._scale(1)

  def _scale(self, mscale: float) -> float:
    longer = self.factor > 1
    return 0.1 * mscale * math.log(self.factor) + 1 if longer else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongScaling:
  """A factor for each pair: one set of them for sequences beyond the original.

  Attributes:
    short_factor: [pairs], of wavelengths in sequences of the original length.
    long_factor: [pairs], of those in longer ones.
    original_max_positions: The original length.
    max_positions: The length that the model was made for.
    factor: Of the length; None is the ratio of the two.
    attention_factor: What cosines and sines are multiplied by; None follows
      from the factor.

  References:
    Ding et al., `LongRoPE <https://arxiv.org/abs/2402.13753>`_.
  """

  KIND: ClassVar[str] = 'longrope'

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  original_max_positions: int
  max_positions: int
  factor: float | None = None
  attention_factor: float | None = None

  def frequencies(
    self, exponents: np.ndarray, theta: float, length: jax.Array | int
  ) -> jax.Array:
    """Returns the frequencies for the longest of several sequences.

    Args:
      exponents: float32 [pairs], of `theta` in the wavelengths.
      theta: Base of the wavelengths.
      length: int scalar; of the longest sequence.
    """
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    short, long = (
      np.float32(1) / (np.asarray(factors, np.float32) * powers)
      for factors in (self.short_factor, self.long_factor)
    )
    return jnp.where(length > self.original_max_positions, long, short)

  @property
  def amplitude(self) -> float:
    """What cosines and sines are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    factor = self.factor or self.max_positions / self.original_max_positions
    if factor <= 1:
      return 1.0
    return math.sqrt(
      1 + math.log(factor) / math.log(self.original_max_positions)
    )


RopeScaling = (
  LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongScaling
)
# Those whose frequencies depend on how long the sequences are.
ByLength = DynamicScaling | LongScaling
LISTS = ('short_factor', 'long_factor')
KINDS: dict[str, Any] = {
  kind.KIND: kind
  for kind in (
    LinearScaling,
    DynamicScaling,
    Llama3Scaling,
    YarnScaling,
    LongScaling,
  )
}
