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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.lora import INITS_THAT_CHANGE_THE_BASE, Strength
from jlora.errors import ConfigError

RoundTrip = Callable[[jax.Array], jax.Array]


class Start(NamedTuple):
  """What training starts from.

  Attributes:
    a: float32 [*stacked, in, rank]; zero beyond the rank of a layer.
    b: float32 [*stacked, rank, out]; likewise.
    taken: The factors that are taken out of the base, shaped like `a` and `b`;
      None where they are `a` and `b`, or nothing is taken out.
  """

  a: jax.Array
  b: jax.Array
  taken: tuple[jax.Array, jax.Array] | None = None


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
    'pissa': pissa,
    'olora': olora,
    'loftq': functools.partial(loftq, round_trip=round_trip),
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


def pissa(
  kernel: jax.Array, rank: jax.Array, scale: jax.Array, *, width: int
) -> Start:
  """Starts from the kernel's largest singular values.

  With W = U S V^T, `s * a @ b` is the best approximation of W of that rank,
  its singular values shared evenly between the factors. Where one is zero, so
  are both factors, and stay it: a kernel of zeros cannot be trained this way.

  Args:
    kernel: float32 [in, out], one layer.
    rank: Of this layer, at most `width`; zero for none.
    scale: Of this layer.
    width: Columns of `a`; those beyond the rank are zero.

  References:
    Meng et al., `PiSSA <https://arxiv.org/abs/2404.02948>`_, section 3. The
    residual is smoother than the kernel, so it loses less to 4 bits.
  """
  a, b, _ = _largest(kernel, rank, scale, width)
  return Start(a, b)


def olora(
  kernel: jax.Array, rank: jax.Array, scale: jax.Array, *, width: int
) -> Start:
  """Starts from an orthonormal basis of the kernel's first inputs.

  With W^T = Q R, `b` holds the first columns of Q and `a` the first rows of R,
  signs as the decomposition gives them; they depend on the first inputs alone.
  Neither is divided by the scale, so only with a scale of one (alpha = rank)
  has the residual nothing left in that basis; with two it is a reflection, as
  large as the kernel.

  The arguments are those of `pissa`.

  References:
    Büyükakyüz, `OLoRA <https://arxiv.org/abs/2406.01775>`_; oriented as in
    `olora_init` of PEFT.
  """
  basis, _ = jnp.linalg.qr(kernel[:width].T)
  b = jnp.where((jnp.arange(width) < rank)[:, None], basis.T, 0)
  return Start(_product(kernel, b.T), b)


def loftq(
  kernel: jax.Array,
  rank: jax.Array,
  scale: jax.Array,
  *,
  width: int,
  round_trip: RoundTrip,
  iterations: int = 5,
) -> Start:
  """Starts from what quantization loses, quantizing what the adapter leaves.

  In turn, Q = q(W - s a b) and `s * a @ b` = the best approximation of W - Q
  of that rank. Where the rank is a large share of the kernel's, further turns
  can make |W - Q - s a b| worse; the best turn is kept, so that more of them
  never do.

  Args:
    kernel, rank, scale, width: As in `pissa`.
    round_trip: q, from float32 [in, out] to the same, dequantized.
    iterations: Number of turns, one or more.

  Returns:
    The factors, and as `taken` those of the turn before the one that is kept:
    quantizing what they leave gives Q.

  References:
    Li et al., `LoftQ <https://arxiv.org/abs/2310.08659>`_, algorithm 1.
  """

  def turn(_: int, state: tuple[Start, Start, jax.Array]) -> tuple:
    last, best, least = state
    residual = _take_out(kernel, last.a, last.b, scale)
    lost = kernel - round_trip(residual).astype(jnp.float32)
    a, b, error = _largest(lost, rank, scale, width)
    new, better = Start(a, b, (last.a, last.b)), error < least
    best = jax.tree.map(functools.partial(jnp.where, better), new, best)
    return new, best, jnp.where(better, error, least)

  a = jnp.zeros((kernel.shape[0], width), jnp.float32)
  b = jnp.zeros((width, kernel.shape[1]), jnp.float32)
  zero = Start(a, b, (a, b))
  state = (zero, zero, jnp.asarray(jnp.inf, jnp.float32))
  return jax.lax.fori_loop(0, iterations, turn, state)[1]


def _largest(
  matrix: jax.Array, rank: jax.Array, scale: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns a and b of the best approximation, and its squared error.

  The singular vectors are eigenvectors of W W^T or W^T W, whichever is smaller:
  several times faster than a decomposition into singular values, and as good,
  for `s * a @ b` is a projection of W, which is stationary in them.

  Args:
    matrix: float32 [in, out].
    rank: Of the approximation, at most `width`.
    scale: What `a @ b` will be multiplied by.
    width: Columns of `a`.
  """
  if matrix.shape[0] > matrix.shape[1]:
    b, a, error = _largest(matrix.T, rank, scale, width)
    return a.T, b.T, error
  squares, vectors = jnp.linalg.eigh(_product(matrix, matrix.T))
  rest = jnp.where(jnp.arange(squares.size) < rank, 0, squares[::-1])
  left = vectors[:, ::-1][:, :width]
  right = _product(left.T, matrix)  # rows as long as the singular values
  lengths = jnp.linalg.norm(right, axis=1)
  values = jnp.where(jnp.arange(width) < rank, lengths, 0)
  scale = jnp.where(scale > 0, scale, 1)  # it is zero where the rank is
  root = jnp.sqrt(values / scale)
  inverse = jnp.where(root > 0, 1 / jnp.where(root > 0, scale * root, 1), 0)
  error = jnp.maximum(rest, 0).sum()
  return left * root[None], inverse[:, None] * right, error


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
      _take_out(matrix.astype(jnp.float32), a, b, scale)
    )

  found = jax.lax.map(one, (layers, *factors, strength.scales.reshape(-1)))
  return found.reshape(kernel.shape)


def _take_out(
  kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array
) -> jax.Array:
  return kernel - scale * jax.lax.optimization_barrier(_product(a, b))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision='highest')
