import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.core import formats


def test_the_dynamic_map_has_the_bytes_of_bitsandbytes():
  # sha256 of create_dynamic_map() of bitsandbytes 0.50.2, as float32.
  digest = 'e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c'
  assert formats.DYNAMIC.dtype == np.float32
  assert hashlib.sha256(formats.DYNAMIC.tobytes()).hexdigest() == digest


def test_the_dynamic_map_equals_the_installed_library():
  functional = pytest.importorskip('bitsandbytes.functional')
  theirs = functional.create_dynamic_map().numpy()
  np.testing.assert_array_equal(formats.DYNAMIC, theirs)


def test_nf4_equals_the_installed_library():
  functional = pytest.importorskip('bitsandbytes.functional')
  theirs = functional.get_4bit_type('nf4', device='cpu').numpy()
  np.testing.assert_array_equal(formats.NF4, theirs)


@pytest.mark.parametrize('levels', [formats.NF4, formats.DYNAMIC])
def test_nearest_minimizes_the_distance(levels):
  x = np.random.default_rng(0).uniform(-1.1, 1.1, 20_000).astype(np.float32)
  chosen = np.asarray(formats.nearest(jnp.asarray(x), levels))
  wide = levels.astype(np.float64)
  distance = np.abs(x[:, None].astype(np.float64) - wide[None])
  taken = np.take_along_axis(distance, chosen[:, None].astype(int), 1)[:, 0]
  # A midpoint is rounded to float32: an ulp of 1 is 1.2e-7.
  assert (taken - distance.min(axis=1)).max() <= 1.2e-7


@pytest.mark.parametrize('levels', [formats.NF4, formats.DYNAMIC])
def test_every_level_is_its_own_nearest(levels):
  codes = formats.nearest(jnp.asarray(levels), levels)
  np.testing.assert_array_equal(codes, np.arange(len(levels)))


@pytest.mark.parametrize('levels', [formats.NF4, formats.DYNAMIC])
def test_a_midpoint_takes_the_lower_level(levels):
  codes = formats.nearest(jnp.asarray(formats.midpoints(levels)), levels)
  np.testing.assert_array_equal(codes, np.arange(len(levels) - 1))


def test_the_reciprocal_of_zero_is_zero():
  values = formats.reciprocal(jnp.array([0.0, 4.0]))
  np.testing.assert_array_equal(values, [0.0, 0.25])
