import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.core import formats
from jlora.core.axes import parse_roles
from jlora.core.quantization import quantize_leaf
from jlora.core.quantized import single_level
from jlora.errors import ConfigError

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'bitsandbytes_4bit.npz'
MATRIX = parse_roles('in -> out')
STACK = parse_roles('layers | in -> out')
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def normal(*shape, seed=0):
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def quantize_matrix(kernel, **fields):
  spec = jlora.QuantSpec(**fields)
  return quantize_leaf(jnp.asarray(kernel), MATRIX, spec)


def columns(theirs, out):
  """What bitsandbytes has by output, with the outputs last."""
  return theirs.reshape(out, -1).T


def installed(kernel, name, block_size):
  """What the installed bitsandbytes makes of a [in, out] kernel."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('bitsandbytes')
  from tests.golden.make_bitsandbytes_4bit import bytes_of

  return bytes_of(torch.from_numpy(kernel.T.copy()), name, block_size)


def expect_same_bytes(kernel, theirs, *, nested, **fields):
  out = kernel.shape[1]
  ours = quantize_matrix(kernel, double_quant=nested, **fields)
  np.testing.assert_array_equal(ours.codes, columns(theirs['packed'], out))
  if not nested:
    np.testing.assert_array_equal(ours.scales, columns(theirs['absmax'], out))
    return
  np.testing.assert_allclose(ours.scales2, theirs['nested_absmax2'], rtol=1e-6)
  np.testing.assert_allclose(ours.offset, theirs['offset'], rtol=1e-6)
  codes = columns(theirs['nested_absmax'], out).astype(int)
  difference = np.abs(np.asarray(ours.scales).astype(int) - codes)
  assert difference.max() <= 1
  assert (difference > 0).mean() <= 0.005


@pytest.mark.parametrize('block_size', [32, 64, 256, 4096])
@pytest.mark.parametrize(
  ('name', 'nested'), [('nf4', False), ('nf4', True), ('fp4', False)]
)
def test_bytes_are_those_of_the_golden_file(name, block_size, nested):
  prefix = f'{name}/{block_size}/'
  with np.load(GOLDEN) as file:
    theirs = {k.removeprefix(prefix): file[k] for k in file if prefix in k}
  fields = {'format': name, 'block_size': block_size}
  expect_same_bytes(normal(4096, 6), theirs, nested=nested, **fields)


@pytest.mark.parametrize('block_size', [128, 512, 1024, 2048])
@pytest.mark.parametrize('name', ['nf4', 'fp4'])
def test_bytes_are_those_of_the_installed_library(name, block_size):
  kernel = normal(4096, 8, seed=1)
  theirs = installed(kernel, name, block_size)
  fields = {'format': name, 'block_size': block_size}
  expect_same_bytes(kernel, theirs, nested=False, **fields)


def test_nested_scales_differ_from_the_installed_library_rarely_and_by_one():
  kernel = normal(512, 768, seed=1)
  expect_same_bytes(kernel, installed(kernel, 'nf4', 64), nested=True)


def test_nested_codes_are_the_true_nearest_levels():
  kernel = normal(512, 256)
  x = quantize_matrix(kernel)
  absmax = np.asarray(quantize_matrix(kernel, double_quant=False).scales)
  flat = (absmax - np.asarray(x.offset)).T.reshape(-1, 256)
  scaled = flat / np.asarray(x.scales2)[:, None]
  levels = formats.DYNAMIC.astype(np.float64)
  distance = np.abs(scaled[..., None].astype(np.float64) - levels)
  codes = np.asarray(x.scales).T.reshape(-1, 256)
  taken = np.take_along_axis(distance, codes[..., None].astype(int), -1)[..., 0]
  # Scaling by a reciprocal is two roundings, a midpoint one: 3 * 2**-24.
  assert (taken - distance.min(axis=-1)).max() <= 3 * 2.0**-24


@pytest.mark.parametrize('double_quant', [False, True])
@pytest.mark.parametrize('block_size', BLOCK_SIZES)
@pytest.mark.parametrize('name', formats.FORMATS)
def test_bits_a_weight_are_those_of_the_formula(name, block_size, double_quant):
  spec = jlora.QuantSpec(
    format=name, block_size=block_size, double_quant=double_quant
  )
  shape = (4096, 256)
  x = quantize_leaf(jax.ShapeDtypeStruct(shape, jnp.float32), MATRIX, spec)
  # NF4 in blocks of 64: 4.5, or 4.127 with double quantization.
  scale = 8 + 32 / 256 if double_quant else 32
  offset = 32 / math.prod(shape) if double_quant else 0
  bits = formats.FORMATS[name].bits + scale / block_size + offset
  assert 8 * x.nbytes / x.size == bits


def half_the_largest_gap(levels):
  return np.diff(np.unique(levels[np.abs(levels) <= 1])).max() / 2


@jax.jit
def decode(x):
  return single_level(x).scales, jlora.dequantize(x)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
  name=st.sampled_from(list(formats.FORMATS)),
  block_size=st.sampled_from([2, 6, 32, 64, 128]),
  shape=st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 9)),
  double_quant=st.booleans(),
  size=st.sampled_from([1e-37, 1e-3, 1.0, 1e4]),
)
def test_any_shape_comes_back_within_half_a_gap(
  name, block_size, shape, double_quant, size
):
  kernel = normal(*shape) * np.float32(size)
  spec = jlora.QuantSpec(
    format=name, block_size=block_size, double_quant=double_quant
  )
  x = quantize_leaf(jnp.asarray(kernel), STACK, spec)
  layers, inputs, out = shape
  blocks = math.ceil(inputs / block_size)
  codes = blocks * block_size * out // x.codes_per_byte
  second = 4 * math.ceil(blocks * out / 256) + 4
  scales = blocks * out + second if double_quant else 4 * blocks * out
  assert x.shape == shape
  assert x.nbytes == layers * (codes + scales)
  padded = np.pad(kernel, ((0, 0), (0, -inputs % block_size), (0, 0)))
  absmax = np.abs(padded.reshape(layers, blocks, block_size, out)).max(axis=2)
  found, decoded = map(np.asarray, decode(x))
  # Four roundings, each by 2**-24: reciprocal, product, midpoint, product.
  bound = half_the_largest_gap(formats.FORMATS[name].levels) + 4 * 2.0**-24
  bound = bound * absmax + np.abs(found - absmax)
  bound = np.repeat(bound, block_size, axis=1)[:, :inputs]
  assert (np.abs(decoded - kernel) <= bound).all()
  if not double_quant:
    np.testing.assert_array_equal(found, absmax)


@pytest.mark.parametrize('name', formats.FORMATS)
def test_a_zero_block_stays_zero(name):
  kernel = normal(128, 6)
  kernel[64:, 2] = 0
  kernel[:, 4] = 0
  x = quantize_matrix(kernel, format=name)
  decoded = np.asarray(jlora.dequantize(x))
  np.testing.assert_array_equal(decoded[64:, 2], np.zeros(64))
  np.testing.assert_array_equal(decoded[:, 4], np.zeros(128))
  assert (decoded[:64, 2] != 0).any()


@pytest.mark.parametrize('name', ['fp4', 'int8'])
def test_input_is_padded_with_codes_of_zero_to_a_block(name):
  kernel = normal(101, 6)
  padded = np.concatenate([kernel, np.zeros((27, 6), np.float32)])
  x = quantize_matrix(kernel, format=name)
  whole = quantize_matrix(padded, format=name)
  assert x.shape == (101, 6)
  assert x.codes.shape == (128 // x.codes_per_byte, 6)
  np.testing.assert_array_equal(x.codes, whole.codes)
  decoded = np.asarray(jlora.dequantize(whole))
  np.testing.assert_array_equal(jlora.dequantize(x), decoded[:101])
  np.testing.assert_array_equal(decoded[101:], np.zeros((27, 6)))


def test_stacked_layers_are_quantized_alone():
  spec = jlora.QuantSpec()
  kernels = normal(3, 128, 10) * np.array([1, 10, 0.1])[:, None, None]
  kernels = kernels.astype(np.float32)
  stack = quantize_leaf(jnp.asarray(kernels), STACK, spec)
  for i, kernel in enumerate(kernels):
    alone = quantize_leaf(jnp.asarray(kernel), MATRIX, spec)
    layer = jax.tree.map(lambda x, i=i: np.asarray(x)[i], stack)
    jax.tree.map(np.testing.assert_array_equal, layer, alone)


def test_fields_keep_the_stacked_axes():
  kernel = jax.ShapeDtypeStruct((3, 5, 576, 192), jnp.bfloat16)
  roles = parse_roles('layers experts | in -> out')
  x = quantize_leaf(kernel, roles, jlora.QuantSpec())
  assert (x.codes.shape, x.codes.dtype) == ((3, 5, 288, 192), jnp.uint8)
  assert (x.scales.shape, x.scales.dtype) == ((3, 5, 9, 192), jnp.uint8)
  assert (x.scales2.shape, x.offset.shape) == ((3, 5, 7), (3, 5))
  assert (x.shape, x.ndim) == ((3, 5, 576, 192), 4)
  assert (x.stacked, x.dtype) == ((3, 5), jnp.bfloat16)


def test_quantize_changes_the_targets_only():
  params = {
    'up': {'kernel': jnp.ones((64, 4)), 'bias': jnp.ones(4)},
    'head': {'kernel': jnp.ones((64, 9))},
  }
  spec = jlora.QuantSpec(axes={'head/.*': 'embed -> vocab'})
  quantized = jlora.quantize(params, spec)
  assert isinstance(quantized['up']['kernel'], jlora.QuantizedArray)
  assert quantized['up']['bias'] is params['up']['bias']
  assert quantized['head']['kernel'] is params['head']['kernel']


def test_a_second_quantization_changes_nothing():
  params = {'weight': jnp.asarray(normal(4, 64))}
  spec = jlora.QuantSpec(
    targets='weight', axes={'weight': 'out in: in -> out'}, format='int8'
  )
  once = jlora.quantize(params, spec)
  assert once['weight'].shape == (4, 64)
  assert jlora.quantize(once, spec)['weight'] is once['weight']


@pytest.mark.parametrize(
  'fields',
  [{'targets': 'layers/1/kernel'}, {'exclude': 'layers/[02]/kernel'}],
  ids=['targets', 'exclude'],
)
def test_a_part_of_a_stack_is_refused(fields):
  params = {'layers': {'kernel': jnp.ones((3, 64, 4))}}
  spec = jlora.QuantSpec(axes={'.*': 'layers | in -> out'}, **fields)
  with pytest.raises(
    ConfigError, match=r"1 of the 3 layers of 'layers/kernel'.*match the whole"
  ):
    jlora.quantize(params, spec)


@pytest.mark.parametrize(
  ('leaf', 'message'),
  [
    (jnp.ones((64, 4), jnp.int32), "'norm/scale' of dtype int32 cannot be"),
    (jnp.ones(64), r"'norm/scale' of shape \(64,\) is no kernel"),
  ],
  ids=['integers', 'no kernel'],
)
def test_what_cannot_be_quantized_is_refused_by_path(leaf, message):
  params = {'norm': {'scale': leaf}}
  with pytest.raises(ConfigError, match=message):
    jlora.quantize(params, jlora.QuantSpec(targets='norm/scale'))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('format', 'nf5'),
    ('format', ['nf4']),
    ('block_size', 0),
    ('block_size', 7),
    ('block_size', 64.0),
    ('block_size', '64'),
    ('dtype', 'float99'),
    ('dtype', 'int8'),
  ],
)
def test_a_spec_refuses_what_cannot_be(field, value):
  with pytest.raises(ConfigError, match=f'quant.{field}.*') as raised:
    jlora.QuantSpec(**{field: value})
  assert repr(value) in str(raised.value)


def test_specs_with_lists_are_hashable():
  spec = jlora.QuantSpec(targets=['a', 'b'], axes={'a': 'in -> out'})
  same = jlora.QuantSpec(targets=('a', 'b'), axes=(('a', 'in -> out'),))
  assert hash(spec) == hash(same)
  assert spec == same
