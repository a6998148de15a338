"""How adapters start, as functions of kernels in matrix form.

A kernel is `[*stacked, in, out]`, and the update of each of its layers is
`s * a @ b`. Two inits leave the kernel alone, because `b` starts at zero; the
others make both factors from the kernel and take their product out of it:

    init      a                   b                   frozen
    lora      U(±1 / sqrt(in))    0                   W
    gaussian  N(0, 1 / rank^2)    0                   W
    pissa     U_r sqrt(S_r / s)   sqrt(S_r / s) V_r'  W - s a b; W = U S V'
    olora     R_r'                Q_r'                W - s a b; W' = Q R
    loftq     as pissa, of W - q(W - s c d)           W - s c d, the turn before

What is taken out is kept as factors, so that the frozen part can be had again
without another decomposition: one rounded differently would quantize to other
codes, and LoftQ's turns make more of such differences each time.

References:
  Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_;
  Meng et al., `PiSSA <https://arxiv.org/abs/2404.02948>`_;
  Büyükakyüz, `OLoRA <https://arxiv.org/abs/2406.01775>`_;
  Li et al., `LoftQ <https://arxiv.org/abs/2310.08659>`_.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core import decompositions
from jlora.core.decompositions import RoundTrip, Start
from jlora.core.lora import INITS_THAT_CHANGE_THE_BASE, Strength
from jlora.errors import ConfigError


def start(
  init: str,
  key: jax.Array,
  shape: tuple[tuple[int, ...], int, int],
  strength: Strength,
  *,
  kernel: jax.Array | None = None,
  one_hot: bool = False,
  round_trip: RoundTrip | None = None,
) -> Start:
  """Returns the adapter that a kernel starts with.

  Args:
    init: One of `lora.INITS`.
    key: PRNG key; only 'lora' and 'gaussian' draw from it.
    shape: Sizes of the stacked axes, `in` and `out` of the kernel.
    strength: Ranks and scales of its layers.
    kernel: [*stacked, in, out] of any float dtype, for an init that changes
      the base. Layers are taken one at a time, so scratch is one layer's.
    one_hot: Whether the kernel's inputs are one-hot, as an embedding's are;
      'lora' and 'gaussian' then both draw from `normal_a`.
    round_trip: What quantization makes of one [in, out] layer, dequantized;
      'loftq' needs it.

  Raises:
    ConfigError: The init needs what is missing.
  """
  if init not in INITS_THAT_CHANGE_THE_BASE:
    return _random(init, key, shape, strength, one_hot)
  if kernel is None:
    raise ConfigError(
      f'lora.init {init!r} starts from the kernel, and there is none; pass'
      " dense parameters, or use init 'lora'"
    )
  rules = {
    'pissa': decompositions.pissa,
    'olora': decompositions.olora,
    'loftq': functools.partial(decompositions.loftq, round_trip=round_trip),
  }
  return _by_layer(rules[init], shape, strength, kernel)


def _random(
  init: str,
  key: jax.Array,
  shape: tuple[tuple[int, ...], int, int],
  strength: Strength,
  one_hot: bool,
) -> Start:
  stacked, size, out = shape
  draw = uniform_a if init == 'lora' and not one_hot else normal_a
  a = draw(key, stacked, size, strength.rank)
  if init == 'gaussian' and not one_hot:
    a = a / np.maximum(strength.ranks, 1).astype(np.float32)[..., None, None]
  used = np.arange(strength.rank) < strength.ranks[..., None]
  a = jnp.where(used[..., None, :], a, 0)
  return Start(a, jnp.zeros((*stacked, strength.rank, out), jnp.float32))


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


def normal_a(
  key: jax.Array, stacked: tuple[int, ...], size: int, rank: int
) -> jax.Array:
  """Returns N(0, 1), float32 [*stacked, size, rank].

  For 'gaussian' it is divided by the rank, and for embeddings taken as it is:
  a one-hot input reads one row, so its fan-in is one. (PEFT draws this for an
  embedding too, but for the side that is `b` here, with zeros on the other.)
  """
  return jax.random.normal(key, (*stacked, size, rank), jnp.float32)


def _by_layer(
  rule: Callable[..., Start],
  shape: tuple[tuple[int, ...], int, int],
  strength: Strength,
  kernel: jax.Array,
) -> Start:
  """Applies a rule such as `pissa` to the layers of a stack, one by one."""
  stacked, size, out = shape

  def one(layer: tuple[jax.Array, jax.Array, jax.Array]) -> Start:
    matrix, rank, scale = layer
    return rule(matrix.astype(jnp.float32), rank, scale, width=strength.rank)

  matrices = kernel.reshape(-1, size, out)
  ranks, scales = strength.ranks.reshape(-1), strength.scales.reshape(-1)
  found = jax.lax.map(one, (matrices, ranks, scales))
  return jax.tree.map(lambda x: x.reshape(*stacked, *x.shape[1:]), found)


def take_out(kernel: jax.Array, start: Start, strength: Strength) -> jax.Array:
  """Returns what is frozen (and quantized) instead of a kernel.

  Args:
    kernel: [*stacked, in, out] of any float dtype.
    start: How its adapter starts, with an init that changes the base.
    strength: Ranks and scales of its layers.

  Returns:
    float32 [*stacked, in, out].
  """
  a, b = start.taken or (start.a, start.b)
  layers = kernel.reshape(-1, *kernel.shape[-2:])
  factors = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))

  def one(layer: tuple[jax.Array, ...]) -> jax.Array:
    matrix, a, b, scale = layer
    # The barrier keeps the sum apart from what quantizes it: the same bits.
    return jax.lax.optimization_barrier(
      decompositions.take_out(matrix.astype(jnp.float32), a, b, scale)
    )

  found = jax.lax.map(one, (layers, *factors, strength.scales.reshape(-1)))
  return found.reshape(kernel.shape)
