"""Codes decoded while they are multiplied, as Pallas' interpreter does it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core.axes import parse_roles
from jlora.core.kernels import few_rows
from jlora.core.quantization import quantize_leaf
from jlora.core.quantized import decode_matrices

f32, bf16 = jnp.float32, jnp.bfloat16

# Format, block size, double quantization, in, out, rows, of x, of the kernel.
CASES = {
  'one token': ('nf4', 64, True, 256, 128, 1, bf16, bf16),
  'padded inputs': ('nf4', 32, True, 520, 64, 5, f32, bf16),
  'float32': ('int4', 64, True, 192, 64, 3, f32, f32),
  'float32 scales': ('fp4', 128, False, 256, 96, 17, bf16, bf16),
  'more rows than columns': ('nf4', 64, False, 64, 32, 40, bf16, f32),
}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def quantized(kernel, number_format, block_size, double_quant):
  spec = jlora.QuantSpec(
    format=number_format, block_size=block_size, double_quant=double_quant
  )
  roles = 'in -> out' if kernel.ndim == 2 else 'layers | in -> out'
  return quantize_leaf(kernel, parse_roles(roles), spec)


def run(x, kernel, transposed, **settings):
  return few_rows.multiply(
    x,
    kernel,
    dtype=settings.pop('dtype', f32),
    precision='highest',
    transposed=transposed,
    interpret=True,
    **settings,
  )


def assert_sums_alike(y, x, matrix):
  """As far as float32 sums in any order are: n roundings of what is summed."""
  x, matrix = np.asarray(x, np.float64), np.asarray(matrix, np.float64)
  bound = len(matrix) * 2.0**-24 * (np.abs(x) @ np.abs(matrix))
  difference = np.abs(np.asarray(y, np.float64) - x @ matrix)
  assert (difference <= bound).all()
  assert (x @ matrix).any()


@pytest.fixture(scope='module')
def products(quick_jit):
  """Runs a case, compiled at once: for both ways, what is multiplied and y."""

  @functools.cache
  def of(case):
    number_format, block, double, size, out, rows, dtype, kept = CASES[case]

    def program():
      kernel = normal(0, size, out).at[:block, 3].set(0).astype(kept)
      kernel = quantized(kernel, number_format, block, double)
      dense = decode_matrices(kernel)
      for transposed, matrix in ((False, dense), (True, dense.T)):
        x = normal(1, rows, len(matrix)).astype(dtype)
        yield x, matrix, run(x, kernel, transposed)

    return quick_jit(lambda: list(program()))()

  return of


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_a_product_is_that_with_the_decoded_kernel(products, case, transposed):
  x, matrix, y = products(case)[transposed]
  assert y.shape == (len(x), matrix.shape[1])
  assert_sums_alike(y, x, matrix)


@pytest.fixture(scope='module')
def kernel():
  zeros = normal(0, 192, 64).at[:64, 3].set(0)
  return quantized(zeros, 'nf4', 64, True)


def test_a_block_of_zeros_stays_zero(kernel):
  x = jnp.zeros((3, 192)).at[:, :64].set(1e30)
  y = run(x, kernel, transposed=False)
  assert not y[:, 3].any()
  assert y[:, 4].all()


def test_the_result_is_rounded_once(kernel):
  x = normal(1, 3, 192)
  exact = run(x, kernel, transposed=False)
  rounded = run(x, kernel, transposed=False, dtype=bf16)
  assert rounded.dtype == bf16
  assert (rounded == exact.astype(bf16)).all()


def test_stacked_kernels_map(quick_jit):
  def program():
    kernels = quantized(normal(0, 3, 64, 32), 'nf4', 64, True)
    x = normal(1, 3, 2, 64)
    ys = jax.vmap(functools.partial(run, transposed=False))(x, kernels)
    return ys, x, decode_matrices(kernels)

  for y, x, matrix in zip(*quick_jit(program)(), strict=True):
    assert_sums_alike(y, x, matrix)


@pytest.mark.parametrize('rows', [1, 8, 32])
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize(
  'shape', [(4096, 4096), (4096, 14336), (4096, 128256), (576, 192)]
)
def test_a_grid_covers_the_kernel_once(shape, transposed, rows):
  kernel = jax.eval_shape(lambda: quantized(jnp.zeros(shape), 'nf4', 64, True))
  tile = few_rows._tile(rows, kernel, None, transposed=transposed)
  packed, out = kernel.codes.shape
  summed, unit = (out, tile.columns) if transposed else (packed, tile.packed)
  assert tile.splits * tile.steps * unit == summed
  made = (packed // tile.packed) if transposed else (out // tile.columns)
  # It fills a GPU, or sums of parts would be many bytes beside the codes.
  sums = 8 * tile.splits * rows * (2 * packed if transposed else out)
  assert tile.splits == 1 or sums <= packed * out
  assert tile.splits * made < 2 * few_rows.PROGRAMS or tile.splits == 1
