"""A tiny decoder whose greedy continuations vary, and prompts for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder


@pytest.fixture(scope='session')
def config():
  return DecoderConfig(
    vocab_size=97,
    embed_dim=32,
    mlp_dim=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=256,
    tie_embeddings=False,
  )


@pytest.fixture(scope='session')
def model(config):
  return Decoder(config)


@pytest.fixture(scope='session')
def params(model):
  key = jax.random.key(7)
  return model.init(key, jnp.zeros((1, 4), jnp.int32))['params']


@pytest.fixture(scope='session')
def prompts(config):
  random = np.random.default_rng(0)
  lengths = (5, 40, 1, 17, 32, 33)
  return [random.integers(0, config.vocab_size, n) for n in lengths]
