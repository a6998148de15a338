"""A tiny decoder whose greedy continuations vary, prompts, and tuned models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.model_folders import save_folder
from jlora.checkpoints.placement import load_split
from jlora.inference.tuned import Tuned
from jlora.models import families
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from tests.decoders import make_params


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


@pytest.fixture(scope='session')
def square_base(tiny_base, tmp_path_factory):
  """A folder whose kernels have one shape, and compile once."""
  tiny = open_base(str(tiny_base))
  config = dataclasses.replace(tiny.config, mlp_dim=64, kv_heads=4)
  folder = tmp_path_factory.mktemp('square') / 'base'
  save_folder(folder, config, make_params(config), tiny.tokenizer)
  return folder


@pytest.fixture(scope='session')
def make_tuned(square_base):
  """Returns a function of the base, its quantization and LoraSpec's fields."""

  def make(base=None, quant=True, size=0.02, **fields):
    base = open_base(str(base or square_base))
    spec = jlora.LoraSpec(**{'rank': 4, 'alpha': 6.0, **fields})
    spec = families.resolve(spec, base.config)
    quant = jlora.QuantSpec() if quant is True else quant
    quant = quant and families.resolve(quant, base.config)
    key = jax.random.key(0)
    frozen, begun, starts = load_split(
      key, base, spec, quant, jnp.float32, starts=None
    )
    random = np.random.default_rng(1)
    trained = jax.tree.map(
      lambda x: jnp.asarray(x + random.normal(0, size, x.shape), 'f4'), begun
    )
    return Tuned(
      base=base,
      frozen=frozen,
      trainable=trained,
      starts=starts,
      spec=spec,
      quant=quant,
      dtype='float32',
      apply=None,
      metadata={'base_sha256': 'of the dense base', 'step': 3},
    )

  return make
