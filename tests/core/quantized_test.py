import dataclasses
import functools
import hashlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

import jlora
from jlora.core import formats
from jlora.core.axes import parse_roles
from jlora.core.quantization import quantize_leaf
from jlora.core.quantized import (
  decode_codes,
  decode_planes,
  decode_rows,
  dequantize_leaf,
  expand_scales,
  single_level,
)

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'bitsandbytes_4bit.npz'
ORDERS = (
  'out in: in -> out',
  's k d h: d -> s k h',
  'in layers out d: layers | d in -> out',
  'out experts in layers: layers experts | in -> out',
)
SIZES = {'in': 23, 'd': 5, 'out': 6, 'h': 3}


# Mean |error| and mean |error| / |weight| of N(0, 1) weights, by format and
# block size, one level of scales. bitsandbytes measures 0.072798 and 0.203339
# for NF4 in blocks of 64.
ERRORS = {
  ('nf4', 64): (0.072796, 0.20331),
  ('nf4', 256): (0.080329, 0.22606),
  ('fp4', 64): (0.096546, 0.26014),
  ('fp4', 256): (0.108688, 0.28985),
  ('int4', 64): (0.091288, 0.27944),
  ('int4', 256): (0.108308, 0.31515),
  ('int8', 64): (0.0050306, 0.027201),
  ('int8', 256): (0.0059692, 0.031232),
}


def normal(*shape, seed=0):
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def make(*shape, roles='in -> out', **fields):
  kernel = jnp.asarray(normal(*shape))
  return quantize_leaf(kernel, parse_roles(roles), jlora.QuantSpec(**fields))


def make_ordered(roles):
  """A kernel, its codes, its axes in roles' order, and codes of it so."""
  spec = jlora.QuantSpec(format='int8', block_size=32, double_quant=False)
  layout, _, canonical = roles.partition(': ')
  kernel = normal(*[SIZES.get(name, 2) for name in layout.split()])
  axes = [layout.split().index(name) for name in parse_roles(canonical).names]
  x = quantize_leaf(jnp.asarray(kernel), parse_roles(roles), spec)
  straight = quantize_leaf(
    jnp.asarray(kernel.transpose(axes)), parse_roles(canonical), spec
  )
  return kernel, x, axes, straight


def digest(kernel):
  zeros_positive = np.asarray(kernel) + np.float32(0)
  return hashlib.sha256(np.ascontiguousarray(zeros_positive)).hexdigest()


@pytest.mark.parametrize('nested', [False, True], ids=['single', 'nested'])
@pytest.mark.parametrize('block_size', [32, 64, 256, 4096])
@pytest.mark.parametrize('name', ['nf4', 'fp4'])
def test_decoding_the_bytes_of_bitsandbytes_is_exact(name, block_size, nested):
  with np.load(GOLDEN) as file:
    prefix = f'{name}/{block_size}/'
    theirs = {k.removeprefix(prefix): file[k] for k in file if prefix in k}
  scales = theirs['nested_absmax' if nested else 'absmax']
  x = jlora.QuantizedArray(
    codes=jnp.asarray(theirs['packed'].reshape(6, -1).T),
    scales=jnp.asarray(scales.reshape(6, -1).T),
    scales2=jnp.asarray(theirs['nested_absmax2']) if nested else None,
    offset=jnp.asarray(theirs['offset']) if nested else None,
    format=name,
    block_size=block_size,
    inputs=(4096,),
    outputs=(6,),
    dtype=jnp.dtype('float32'),
  )
  expected = str(theirs['nested_decoded' if nested else 'decoded'])
  assert digest(dequantize_leaf(x).T) == expected


def expected_errors(levels, block_size):
  """Both means of ERRORS, by Gauss-Legendre quadrature from the levels alone.

  The quantiles of a block's absmax m are known. Below it weights are normal,
  and the one that is m has no error.
  """
  levels = np.unique(levels[np.abs(levels) <= 1]).astype(float)
  nodes, node_weights = np.polynomial.legendre.leggauss(256)
  absmax = ndtri((1 + ((1 + nodes) / 2) ** (1 / block_size)) / 2)[:, None]
  edges = np.sort(np.concatenate([levels, (levels[1:] + levels[:-1]) / 2]))
  half = np.diff(edges)[:, None] / 2
  points, point_weights = np.polynomial.legendre.leggauss(16)
  x = (edges[:-1, None] + half * (1 + points)).reshape(-1)
  error = np.abs(x[:, None] - levels).min(axis=1)
  weighted = (half * point_weights).reshape(-1) * error
  density = np.exp(-((absmax * x) ** 2) / 2) / math.sqrt(2 * math.pi)
  density *= absmax / (2 * ndtr(absmax) - 1) * (1 - 1 / block_size)
  absolute = (absmax * density) @ weighted
  relative = density @ (weighted / np.abs(x))
  return node_weights / 2 @ absolute, node_weights / 2 @ relative


@pytest.mark.parametrize(('name', 'block_size'), ERRORS)
def test_errors_on_normal_weights_follow_from_the_levels(name, block_size):
  derived = expected_errors(formats.FORMATS[name].levels, block_size)
  # The stored figures have five digits.
  np.testing.assert_allclose(derived, ERRORS[name, block_size], rtol=1e-4)


@pytest.mark.parametrize('name', formats.FORMATS)
def test_errors_on_normal_weights_are_the_stored_ones(name):
  kernel = normal(2048, 256)
  x = make(2048, 256, format=name, double_quant=False)
  error = np.abs(np.asarray(jlora.dequantize(x)) - kernel)
  for values, expected in zip(
    (error, error / np.abs(kernel)), ERRORS[name, 64], strict=True
  ):
    means = values.reshape(-1, 64, 256).mean(axis=1)
    deviation = means.std() / math.sqrt(means.size)
    assert abs(means.mean() - expected) <= 4 * deviation


def test_expanded_scales_round_twice_under_jit():
  random = np.random.default_rng(0)
  x = jlora.QuantizedArray(
    codes=jnp.zeros((32, 1 << 16), jnp.uint8),
    scales=jnp.asarray(random.integers(0, 256, (1, 1 << 16)), jnp.uint8),
    scales2=jnp.asarray(random.uniform(0.1, 3, 256), jnp.float32),
    offset=jnp.float32(2.5870),
    format='nf4',
    block_size=64,
    inputs=(64,),
    outputs=(1 << 16,),
    dtype=jnp.dtype('float32'),
  )
  product = formats.DYNAMIC[np.asarray(x.scales)[0]]
  product = product * np.repeat(np.asarray(x.scales2), 256)
  expected = product + np.float32(2.5870)
  np.testing.assert_array_equal(jax.jit(expand_scales)(x)[0], expected)


@pytest.mark.parametrize('name', formats.FORMATS)
def test_decoding_is_level_times_absmax(name):
  x = make(128, 5, format=name, double_quant=False)
  codes = formats.FORMATS[name].unpack(x.codes)
  levels = formats.FORMATS[name].levels[np.asarray(codes)]
  absmax = np.repeat(np.asarray(x.scales), 64, axis=0)
  np.testing.assert_array_equal(jlora.dequantize(x), levels * absmax)
  assert x.codes_per_byte == {'int8': 1}.get(name, 2)
  assert x.codes.shape == (128 // x.codes_per_byte, 5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', ['nf4', 'fp4', 'int4'])
def test_a_tpu_decodes_to_the_same_bits(name, dtype):
  x = make(100, 24, format=name, block_size=32, dtype=dtype)
  of = {'number_format': formats.FORMATS[name], 'dtype': dtype}
  one, other = (
    jax.jit(functools.partial(decode, **of))(x.codes, expand_scales(x))
    for decode in (decode_codes, decode_planes)
  )
  assert one.shape == (128, 24)
  assert one.dtype == dtype
  assert one.tobytes() == other.tobytes()


def test_on_a_tpu_levels_are_selected_and_elsewhere_looked_up():
  x = make(64, 8, double_quant=False)
  lowered = jax.jit(dequantize_leaf).trace(x)
  for platform, looks_up in (('tpu', False), ('cuda', True), ('cpu', True)):
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert ('stablehlo.gather' in text) == looks_up, platform


@pytest.mark.parametrize(
  ('name', 'double_quant'), [('fp4', False), ('fp4', True), ('int8', True)]
)
def test_decoded_rows_are_the_rows_of_the_decoded(name, double_quant):
  # 9 blocks by 60 outputs: the second-level blocks cross columns.
  x = make(280, 60, format=name, block_size=32, double_quant=double_quant)
  rows = jnp.array([[3, 279, 0], [31, 32, 32]])
  whole = np.asarray(jlora.dequantize(x))
  np.testing.assert_array_equal(jax.jit(decode_rows)(x, rows), whole[rows])
  np.testing.assert_array_equal(jax.jit(decode_rows)(x, 33), whole[33])
  taken = jax.jit(decode_rows)(x.astype(jnp.bfloat16), rows)
  assert (taken.shape, taken.dtype) == ((2, 3, 60), jnp.bfloat16)
  np.testing.assert_array_equal(taken, whole.astype(jnp.bfloat16)[rows])


def test_decoding_rows_reads_little():
  x = make(256, 1024, block_size=32)
  rows = jnp.array([1, 200])
  analysis = jax.jit(decode_rows).lower(x, rows).compile().memory_analysis()
  # A few float32 and int32 of [2, 1024] each; the whole kernel takes 1 MiB.
  assert analysis.temp_size_in_bytes <= 8 * rows.size * 1024 * 4


def test_a_single_level_decodes_to_the_same_and_in_parts():
  x = make(2, 3, 128, 50, roles='layers experts | in -> out')
  single = jax.jit(single_level)(x)
  assert (single.scales2, single.offset) == (None, None)
  assert (single.scales.shape, single.scales.dtype) == ((2, 3, 2, 50), 'f4')
  assert single_level(single) is single
  part = dataclasses.replace(
    single,
    codes=np.asarray(single.codes)[..., 40:],
    scales=np.asarray(single.scales)[..., 40:],
    outputs=(10,),
  )
  decoded = np.asarray(jlora.dequantize(x))
  np.testing.assert_array_equal(jlora.dequantize(single), decoded)
  np.testing.assert_array_equal(jlora.dequantize(part), decoded[..., 40:])


@pytest.mark.parametrize('roles', ORDERS)
def test_any_order_has_the_fields_of_the_transposed_kernel(roles):
  kernel, x, axes, straight = make_ordered(roles)
  jax.tree.map(
    np.testing.assert_array_equal, jax.tree.leaves(x), jax.tree.leaves(straight)
  )
  assert (x.shape, x.ndim, x.size) == (kernel.shape, kernel.ndim, kernel.size)
  np.testing.assert_array_equal(
    np.asarray(jlora.dequantize(x)).transpose(axes), jlora.dequantize(straight)
  )


@pytest.mark.parametrize('roles', ORDERS[2:])
def test_a_layer_keeps_the_order_of_what_is_left(roles):
  kernel, x, _, _ = make_ordered(roles)
  axis = roles.partition(':')[0].split().index('layers')
  layer = jax.tree.map(lambda field: np.asarray(field)[1], x)
  assert layer.shape == kernel.take(1, axis).shape
  expected = np.asarray(jlora.dequantize(x)).take(1, axis)
  np.testing.assert_array_equal(jlora.dequantize(layer), expected)


def test_a_scan_over_layers_decodes_each():
  x = make(3, 64, 4, roles='layers | in -> out')

  def decode(carry, layer):
    return carry, dequantize_leaf(layer)

  _, decoded = jax.lax.scan(decode, None, x)
  np.testing.assert_array_equal(decoded, jlora.dequantize(x))


def test_a_dtype_is_rounded_to_once():
  x = make(128, 8)
  expected = np.asarray(jlora.dequantize(x)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(dequantize_leaf(x, jnp.bfloat16), expected)
