"""A tiny scanned decoder, its parameters, and adapters that are not zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.models import families
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Case:
  """A decoder with both halves of its parameters, adapters trained a little."""

  model: Decoder
  spec: jlora.LoraSpec
  frozen: dict
  trainable: dict
  tokens: jax.Array


@pytest.fixture(scope='session')
def config():
  return DecoderConfig(
    vocab_size=160,
    embed_dim=64,
    mlp_dim=96,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
  )


@pytest.fixture(scope='session')
def params(config):
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(Decoder(config).init)(jax.random.key(0), tokens)['params']


@pytest.fixture(scope='session')
def perturb():
  """Adds noise to every leaf, so that no adapter is zero."""

  def run(tree, size=0.05):
    random = np.random.default_rng(1)

    def add(x):
      noise = size * random.standard_normal(x.shape)
      return x + jnp.asarray(noise, x.dtype)

    return jax.tree.map(add, tree)

  return run


@pytest.fixture(scope='session')
def make_case(config, params, perturb):
  """Builds a Case; keywords of `LoraSpec` follow the first two arguments."""

  @functools.cache
  def make(remat='none', quant=True, dtype=jnp.float32, **fields):
    fields = {'rank': 3, 'alpha': 12.0} | fields
    spec = families.resolve(jlora.LoraSpec(**fields), config)
    four_bit = families.resolve(jlora.QuantSpec(), config) if quant else None
    split = functools.partial(jlora.partition, spec=spec, quant=four_bit)
    frozen, trainable = jax.jit(split)(jax.random.key(2), params)
    return Case(
      model=Decoder(config, dtype=dtype, remat=remat),
      spec=spec,
      frozen=frozen,
      trainable=perturb(trainable),
      tokens=jax.random.randint(jax.random.key(3), (2, 5), 0, 160),
    )

  return make
