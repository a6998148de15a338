"""What a rematerialized layer computes again, counted in traced programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.core.tree import nest
from jlora.models import families, layout
from jlora.models.decoder import Decoder
from jlora.training.traced import count_flops
from tests.decoders import CONFIG

TOKENS = jax.ShapeDtypeStruct((2, 24), jnp.int32)


def flops(config, remat, **fields):
  """Returns the products of a loss of hidden states and its gradient."""
  spec = jlora.LoraSpec(rank=4, **fields)
  spec = families.resolve(spec, config)
  quant = families.resolve(jlora.QuantSpec(block_size=16), config)
  params = nest(layout.shapes(config, jnp.float32))
  key = jax.random.key(0)
  frozen, trainable = jlora.partition(key, params, spec, quant=quant)
  apply = jlora.lift(Decoder(config, remat=remat).apply)

  def loss(trainable, frozen, tokens):
    params = jlora.combine(frozen, trainable, spec)
    return apply({'params': params}, tokens, method='hidden').sum()

  program = jax.make_jaxpr(jax.grad(loss))(trainable, frozen, TOKENS)
  return count_flops(program)


@pytest.mark.parametrize('fields', [{}, {'variant': 'dora'}], ids=str)
def test_dots_keeps_every_product(fields):
  config = dataclasses.replace(CONFIG, layers=2)
  none, dots, full = (
    flops(config, remat, **fields) for remat in ('none', 'dots', 'full')
  )
  assert none == dots < full
