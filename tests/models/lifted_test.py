"""Every family is adapted and quantized without a kernel being formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.models import families
from jlora.models.decoder import Decoder
from tests.decoders import BUSIEST, make_config, make_params

QUANT = {'lora': None, 'qlora': jlora.QuantSpec(block_size=4)}


@pytest.mark.parametrize('method', QUANT)
@pytest.mark.parametrize('name', BUSIEST)
def test_lifted_logits_and_gradients_are_the_merged(name, method, quick_jit):
  config = make_config(name)
  spec = families.resolve(jlora.LoraSpec(rank=2), config)
  quant = QUANT[method] and families.resolve(QUANT[method], config)
  key, tokens = jax.random.key(0), jnp.arange(24).reshape(2, 12) * 5 % 96
  frozen, trainable = jlora.partition(
    key, make_params(config), spec, quant=quant
  )
  rng = np.random.default_rng(0)
  trainable = jax.tree.map(
    lambda x: x + rng.normal(0, 0.05, x.shape).astype('f4'), trainable
  )

  def loss(trainable, lifted):
    if lifted:
      apply = jlora.lift(
        Decoder(config, remat='full').apply, on_missing='error'
      )
      params = jlora.combine(frozen, trainable, spec)
    else:
      apply = Decoder(config).apply
      params = jlora.merge(frozen, trainable, spec)
    return jnp.var(apply({'params': params}, tokens))

  run = quick_jit(jax.value_and_grad(loss), static_argnums=1)
  found, gradient = run(trainable, True)
  expected, oracle = run(trainable, False)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=3e-4 * float(jnp.abs(b).max())
    ),
    gradient,
    oracle,
  )
