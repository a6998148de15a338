import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.core import formats
from jlora.core.formats import FORMATS


def uniform(*shape, seed=0):
  random = np.random.default_rng(seed)
  return random.uniform(-1, 1, shape).astype(np.float32)


def test_the_dynamic_map_has_the_bytes_of_bitsandbytes():
  # sha256 of create_dynamic_map() of bitsandbytes 0.50.2, as float32.
  digest = 'e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c'
  assert formats.DYNAMIC.dtype == np.float32
  assert hashlib.sha256(formats.DYNAMIC.tobytes()).hexdigest() == digest


def test_the_dynamic_map_equals_the_installed_library():
  functional = pytest.importorskip('bitsandbytes.functional')
  theirs = functional.create_dynamic_map().numpy()
  np.testing.assert_array_equal(formats.DYNAMIC, theirs)


@pytest.mark.parametrize('name', ['nf4', 'fp4'])
def test_4_bit_tables_equal_the_installed_library(name):
  functional = pytest.importorskip('bitsandbytes.functional')
  theirs = functional.get_4bit_type(name, device='cpu').numpy()
  np.testing.assert_array_equal(FORMATS[name].levels, theirs)


def test_fp4_has_its_sign_in_bit_3():
  levels = FORMATS['fp4'].levels
  expected = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
  np.testing.assert_allclose(levels[:8], expected, rtol=2.0**-24)
  np.testing.assert_array_equal(levels[8:], -levels[:8])


@pytest.mark.parametrize(('name', 'half'), [('int4', 8), ('int8', 128)])
def test_integers_are_symmetric_around_an_exact_zero(name, half):
  used = FORMATS[name].levels[1:]
  np.testing.assert_array_equal(used, -used[::-1])
  assert used[half - 1] == 0
  assert (used[0], used[-1]) == (-1, 1)
  expected = (np.arange(1, 2 * half) - half) / (half - 1)
  # Two roundings: of the reciprocal and of the product.
  np.testing.assert_allclose(used, expected, rtol=2 * 2.0**-24)


@pytest.mark.parametrize('name', FORMATS)
def test_every_code_has_a_level_and_one_is_zero(name):
  levels = FORMATS[name].levels
  assert levels.dtype == np.float32
  assert levels.shape == (2 ** FORMATS[name].bits,)
  assert FORMATS[name].codes_per_byte == {16: 2, 256: 1}[len(levels)]
  assert 0 in levels


@pytest.mark.parametrize('name', FORMATS)
def test_encoding_minimizes_the_distance(name):
  x = np.concatenate([uniform(20_000), np.float32([-1, 0, 1])])
  levels = FORMATS[name].levels.astype(np.float64)
  codes = np.asarray(FORMATS[name].encode(jnp.asarray(x)))
  distance = np.abs(x[:, None].astype(np.float64) - levels[None])
  taken = np.take_along_axis(distance, codes[:, None].astype(int), 1)[:, 0]
  # Each rounding by 2**-24 moves the point of decision, and the distances on
  # both of its sides: one for a midpoint; for int8 three, of the product with
  # 127 and of the level's two factors.
  roundings = 3 if name == 'int8' else 1
  assert (taken - distance.min(axis=1)).max() <= 2 * roundings * 2.0**-24


@pytest.mark.parametrize('name', FORMATS)
def test_codes_of_levels_decode_to_them(name):
  levels = FORMATS[name].levels
  given = jnp.asarray(levels[np.abs(levels) <= 1])
  codes = FORMATS[name].encode(given)
  assert codes.dtype == jnp.uint8
  np.testing.assert_array_equal(FORMATS[name].decode(codes), given)


@pytest.mark.parametrize('name', FORMATS)
def test_decoding_has_the_bits_of_the_table_under_jit_too(name):
  levels = FORMATS[name].levels
  codes, scales = jnp.arange(len(levels), dtype=jnp.uint8), uniform(len(levels))
  decode = jax.jit(lambda codes, scales: FORMATS[name].decode(codes) * scales)
  np.testing.assert_array_equal(decode(codes, scales), levels * scales)
  np.testing.assert_array_equal(FORMATS[name].decode(codes), levels)


@pytest.mark.parametrize('name', ['nf4', 'fp4', 'int4'])
def test_selects_give_the_bits_of_the_table(name):
  codes = jnp.arange(len(FORMATS[name].levels), dtype=jnp.uint8)
  for found in (FORMATS[name].select(codes), FORMATS[name].decode(codes)):
    assert found.dtype == jnp.float32
    assert found.tobytes() == FORMATS[name].levels.tobytes()  # -0.0 too


def test_fp4_writes_zero_as_code_0():
  codes = FORMATS['fp4'].encode(jnp.array([0.0, -0.0, -1e-3, 1e-3]))
  # The second zero is what bitsandbytes writes for tiny positive values.
  np.testing.assert_array_equal(codes, [0, 0, 0, 8])


@pytest.mark.parametrize('name', FORMATS)
def test_packed_codes_come_back_whole_and_by_row(name):
  number_format = FORMATS[name]
  random = np.random.default_rng(0)
  codes = random.integers(0, 2**number_format.bits, (10, 3)).astype(np.uint8)
  packed = number_format.pack(jnp.asarray(codes))
  assert packed.shape == (10 // number_format.codes_per_byte, 3)
  np.testing.assert_array_equal(number_format.unpack(packed), codes)
  rows = np.array([3, 0, 9, 9])
  taken = number_format.unpack_rows(packed, jnp.asarray(rows))
  assert taken.dtype == jnp.uint8
  np.testing.assert_array_equal(taken, codes[rows])


def test_the_even_row_is_the_high_nibble():
  packed = FORMATS['nf4'].pack(jnp.array([[1], [2]], jnp.uint8))
  np.testing.assert_array_equal(packed, [[0x12]])


def test_a_midpoint_takes_the_lower_level():
  middle = jnp.asarray(formats.midpoints(formats.NF4))
  codes = FORMATS['nf4'].encode(middle)
  np.testing.assert_array_equal(codes, np.arange(15))
  middle = jnp.asarray(formats.midpoints(formats.DYNAMIC))
  codes = formats.nearest(middle)
  np.testing.assert_array_equal(codes, np.arange(255))


@pytest.mark.parametrize('signed', [True, False])
def test_the_nearest_level_is_the_one_that_a_search_finds(signed):
  levels = formats.dynamic_map(signed=signed)
  middle = formats.midpoints(levels)
  random = np.random.default_rng(0)
  small = 10 ** random.uniform(-12, 0, 100_000)
  values = np.concatenate(
    [
      levels,
      np.nextafter(middle, np.float32(-2)),
      np.nextafter(middle, np.float32(2)),
      *(small, -small, random.uniform(-1, 1, 100_000)),
      *([0.0, -0.0, 1e-39, -1e-39, 1 + 1e-6],),
    ]
  ).astype(np.float32)
  values = values if signed else np.abs(values)
  for run in (
    formats.nearest,
    jax.jit(formats.nearest, static_argnames='signed'),
  ):
    codes = run(jnp.asarray(values), signed=signed)
    np.testing.assert_array_equal(codes, np.searchsorted(middle, values))


def test_the_reciprocal_of_zero_is_zero():
  values = formats.reciprocal(jnp.array([0.0, 1e-39, 4.0]))
  np.testing.assert_array_equal(values, [0.0, 0.0, 0.25])
