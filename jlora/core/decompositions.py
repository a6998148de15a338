"""Factors of one kernel that an adapter can start from: see `initializers`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    residual = take_out(kernel, last.a, last.b, scale)
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


def take_out(
  kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array
) -> jax.Array:
  """Returns `kernel - scale * a @ b`, all operations rounded once."""
  return kernel - scale * jax.lax.optimization_barrier(_product(a, b))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision='highest')
