import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core import formats
from jlora.core.axes import parse_roles
from jlora.core.quantized import dequantize_leaf, expand_scales, quantize_leaf
from jlora.errors import ConfigError

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'bitsandbytes_nf4.npz'
MATRIX = parse_roles('in -> out')
STACK = parse_roles('layers | in -> out')


def normal(*shape, seed=0):
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def quantize_matrix(kernel, **fields):
  spec = jlora.QuantSpec(**fields)
  return quantize_leaf(jnp.asarray(kernel), MATRIX, spec)


def from_bitsandbytes(bytes_of, shape, nested):
  """A QuantizedArray that holds bitsandbytes' bytes for a [in, out] kernel."""
  size, out = shape
  scales = bytes_of['nested_absmax' if nested else 'absmax']
  return jlora.QuantizedArray(
    jnp.asarray(bytes_of['packed'].reshape(out, size // 2).T),
    jnp.asarray(scales.reshape(out, size // 64).T),
    jnp.asarray(bytes_of['nested_absmax2']) if nested else None,
    jnp.asarray(bytes_of['offset']) if nested else None,
    format='nf4',
    block_size=64,
    inputs=(size,),
    outputs=(out,),
    dtype=jnp.dtype('float32'),
  )


def library_bytes(kernel):
  """What the installed bitsandbytes makes of a [in, out] kernel."""
  functional = pytest.importorskip('bitsandbytes.functional')
  torch = pytest.importorskip('torch')
  weight = torch.from_numpy(kernel.T.copy())
  settings = {'blocksize': 64, 'quant_type': 'nf4'}
  packed, single = functional.quantize_4bit(weight, **settings)
  _, double = functional.quantize_4bit(
    weight, compress_statistics=True, **settings
  )
  return {
    'packed': packed.numpy(),
    'absmax': single.absmax.numpy(),
    'nested_absmax': double.absmax.numpy(),
    'nested_absmax2': double.state2.absmax.numpy(),
    'offset': double.offset.numpy(),
    'decoded': functional.dequantize_4bit(packed, single).numpy(),
    'nested_decoded': functional.dequantize_4bit(packed, double).numpy(),
  }


@pytest.fixture(scope='module', params=['golden', 'installed'])
def reference(request):
  """A kernel, and its bytes by the golden file or the installed library."""
  if request.param == 'golden':
    return normal(256, 96), dict(np.load(GOLDEN))
  kernel = normal(512, 768, seed=1)
  return kernel, library_bytes(kernel)


def test_codes_and_absmax_are_byte_equal_to_bitsandbytes(reference):
  kernel, theirs = reference
  ours = quantize_matrix(kernel, double_quant=False)
  expected = from_bitsandbytes(theirs, kernel.shape, nested=False)
  np.testing.assert_array_equal(ours.codes, expected.codes)
  np.testing.assert_array_equal(ours.scales, expected.scales)


def test_nested_scales_differ_from_bitsandbytes_rarely_and_by_one(reference):
  kernel, theirs = reference
  ours = quantize_matrix(kernel)
  expected = from_bitsandbytes(theirs, kernel.shape, nested=True)
  np.testing.assert_array_equal(ours.codes, expected.codes)
  np.testing.assert_allclose(ours.scales2, expected.scales2, rtol=1e-6)
  np.testing.assert_allclose(ours.offset, expected.offset, rtol=1e-6)
  difference = np.abs(ours.scales.astype(int) - expected.scales.astype(int))
  assert difference.max() <= 1
  assert (difference > 0).mean() <= 0.005


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
@pytest.mark.parametrize('nested', [False, True])
def test_decoding_the_bytes_of_bitsandbytes_is_exact(reference, nested, wrap):
  kernel, theirs = reference
  packed = from_bitsandbytes(theirs, kernel.shape, nested)
  decoded = wrap(dequantize_leaf)(packed)
  expected = theirs['nested_decoded' if nested else 'decoded']
  np.testing.assert_array_equal(decoded, expected.T)


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


@pytest.mark.parametrize('double_quant', [False, True])
def test_a_zero_kernel_stays_zero(double_quant):
  x = quantize_matrix(np.zeros((128, 6)), double_quant=double_quant)
  np.testing.assert_array_equal(jlora.dequantize(x), np.zeros((128, 6)))


@pytest.mark.parametrize('double_quant', [False, True])
def test_a_zero_block_stays_zero(double_quant):
  kernel = normal(128, 6)
  kernel[64:, 2] = 0
  decoded = jlora.dequantize(quantize_matrix(kernel, double_quant=double_quant))
  np.testing.assert_array_equal(decoded[64:, 2], np.zeros(64))
  assert (np.asarray(decoded[:64, 2]) != 0).any()


def test_input_is_padded_with_zeros_to_a_block():
  kernel = normal(100, 6)
  padded = np.concatenate([kernel, np.zeros((28, 6), np.float32)])
  x, whole = quantize_matrix(kernel), quantize_matrix(padded)
  assert x.shape == (100, 6)
  assert x.codes.shape == (64, 6)
  np.testing.assert_array_equal(x.codes, whole.codes)
  np.testing.assert_array_equal(jlora.dequantize(x), whole_rows(whole, 100))


def whole_rows(x, count):
  return jlora.dequantize(x)[:count]


@pytest.mark.parametrize('double_quant', [False, True])
def test_stacked_layers_are_quantized_alone(double_quant):
  spec = jlora.QuantSpec(double_quant=double_quant)
  kernels = normal(3, 128, 10) * np.array([1, 10, 0.1])[:, None, None]
  kernels = kernels.astype(np.float32)
  stack = quantize_leaf(jnp.asarray(kernels), STACK, spec)
  for i, kernel in enumerate(kernels):
    alone = quantize_leaf(jnp.asarray(kernel), MATRIX, spec)
    layer = jax.tree.map(lambda x, i=i: x[i], stack)
    jax.tree.map(np.testing.assert_array_equal, layer, alone)


def test_several_input_and_output_axes_are_one_matrix():
  kernel = normal(2, 4, 32, 3, 5)
  roles = parse_roles('layers | heads head_dim -> a b')
  x = quantize_leaf(jnp.asarray(kernel), roles, jlora.QuantSpec())
  flat = quantize_leaf(
    jnp.asarray(kernel.reshape(2, 128, 15)), STACK, jlora.QuantSpec()
  )
  assert x.shape == kernel.shape
  decoded = jlora.dequantize(x)
  np.testing.assert_array_equal(
    decoded.reshape(2, 128, 15), jlora.dequantize(flat)
  )


def test_the_error_on_normal_weights_is_the_published_one():
  kernel = normal(2048, 1024)
  x = quantize_matrix(kernel, double_quant=False)
  error = np.abs(np.asarray(jlora.dequantize(x)) - kernel).mean()
  # bitsandbytes' own table: NF4, blocks of 64, N(0, 1) weights.
  assert abs(error - 0.072798) <= 0.000074


def test_nf4_takes_4_127_bits_a_weight():
  x = quantize_matrix(normal(1024, 1024))
  assert round(8 * x.nbytes / x.size, 3) == 4.127
  single = quantize_matrix(normal(1024, 1024), double_quant=False)
  assert 8 * single.nbytes / single.size == 4.5


def test_fields_keep_the_stacked_axes():
  kernel = jax.ShapeDtypeStruct((3, 5, 576, 192), jnp.bfloat16)
  roles = parse_roles('layers experts | in -> out')
  x = quantize_leaf(kernel, roles, jlora.QuantSpec())
  assert (x.codes.shape, x.codes.dtype) == ((3, 5, 288, 192), jnp.uint8)
  assert (x.scales.shape, x.scales.dtype) == ((3, 5, 9, 192), jnp.uint8)
  assert (x.scales2.shape, x.offset.shape) == ((3, 5, 7), (3, 5))
  assert (x.shape, x.ndim) == ((3, 5, 576, 192), 4)
  assert (x.stacked, x.dtype) == ((3, 5), jnp.bfloat16)


def test_the_compute_dtype_is_the_leafs_unless_the_spec_says_so():
  kernel = normal(64, 4).astype(jnp.bfloat16)
  assert jlora.dequantize(quantize_matrix(kernel)).dtype == jnp.bfloat16
  x = quantize_matrix(kernel, dtype='float32')
  assert jlora.dequantize(x).dtype == jnp.float32


def test_a_dtype_is_rounded_to_once():
  x = quantize_matrix(normal(128, 8))
  expected = jlora.dequantize(x).astype(jnp.bfloat16)
  np.testing.assert_array_equal(dequantize_leaf(x, jnp.bfloat16), expected)


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
  params = {'kernel': jnp.asarray(normal(64, 4))}
  once = jlora.quantize(params, jlora.QuantSpec())
  twice = jlora.quantize(once, jlora.QuantSpec())
  assert twice['kernel'] is once['kernel']


def test_whole_numbers_are_refused():
  params = {'kernel': jnp.ones((64, 4), jnp.int32)}
  with pytest.raises(ConfigError, match='int32 cannot be quantized'):
    jlora.quantize(params, jlora.QuantSpec())


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('format', 'nf5'),
    ('block_size', 0),
    ('block_size', 7),
    ('block_size', 64.5),
    ('dtype', 'float99'),
    ('dtype', 'int8'),
  ],
)
def test_a_spec_refuses_what_cannot_be(field, value):
  with pytest.raises(ConfigError, match=f'quant.{field}.*{value}'):
    jlora.QuantSpec(**{field: value})


def test_specs_with_lists_are_hashable():
  spec = jlora.QuantSpec(targets=['a', 'b'], axes={'a': 'in -> out'})
  same = jlora.QuantSpec(targets=('a', 'b'), axes=(('a', 'in -> out'),))
  assert hash(spec) == hash(same)
  assert spec == same
