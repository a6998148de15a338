import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import rotary
from jlora.models.hf_config import write_config
from jlora.models.rope_scaling import (
  LinearScaling,
  Llama3Scaling,
  YarnScaling,
)
from tests import decoders

CONFIG = dataclasses.replace(decoders.CONFIG, head_dim=64)


def torch_frequencies(config):
  pytest.importorskip('torch')
  from transformers import LlamaConfig
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  fields = write_config(config)
  return LlamaRotaryEmbedding(LlamaConfig(**fields)).inv_freq.numpy()


@pytest.mark.parametrize('theta', [1e4, 1e5, 5e5])
@pytest.mark.parametrize('head_dim', [12, 64, 128])
def test_frequencies_have_the_bits_of_transformers(theta, head_dim):
  config = dataclasses.replace(CONFIG, rope_theta=theta, head_dim=head_dim)
  found = rotary.frequencies(config)
  np.testing.assert_array_equal(found, torch_frequencies(config))
  assert found.dtype == np.float32


SCALINGS = (
  LinearScaling(factor=4.0),
  Llama3Scaling(factor=8.0),
  Llama3Scaling(factor=32.0),
  YarnScaling(factor=4.0, original_max_positions=2048),
  YarnScaling(
    factor=16.0, original_max_positions=64, beta_fast=16, truncate=False
  ),
)


@pytest.mark.parametrize('scaling', SCALINGS)
def test_stretched_frequencies_equal_those_of_transformers(scaling):
  config = dataclasses.replace(CONFIG, rope_theta=5e5, rope_scaling=scaling)
  found = rotary.frequencies(config)
  np.testing.assert_allclose(found, torch_frequencies(config), rtol=3e-7)


def test_the_product_of_query_and_key_depends_on_their_distance():
  rng = np.random.default_rng(0)
  q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 64)).astype('f4'))

  def product(i, j):
    at_i = rotary.angles(jnp.array([[i]]), CONFIG)
    at_j = rotary.angles(jnp.array([[j]]), CONFIG)
    return jnp.sum(rotary.rotate(q, *at_i) * rotary.rotate(k, *at_j))

  np.testing.assert_allclose(product(3, 1), product(20, 18), atol=1e-4)
  assert jnp.abs(product(3, 1) - product(3, 2)) > 0.1


def test_position_zero_turns_nothing():
  x = jnp.ones((1, 1, 2, 64))
  angles = rotary.angles(jnp.zeros((1, 1), jnp.int32), CONFIG)
  np.testing.assert_array_equal(rotary.rotate(x, *angles), x)
