"""Every family is adapted and quantized without a kernel being formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.models import families
from jlora.models.decoder import Decoder
from tests.decoders import make_config, make_params

NAMES = (
  'llama biases',
  'mistral',
  'qwen2 windows',
  'qwen3',
  'smollm3 windows',
  'phi3',
  'gemma2',
  'gemma3_text',
  'gpt2',
  'mixtral',
  'qwen3_moe',
)


@pytest.mark.parametrize('name', NAMES)
def test_lifted_logits_and_gradients_are_the_merged(name):
  config = make_config(name)
  spec = families.resolve(jlora.LoraSpec(rank=2), config)
  quant = families.resolve(jlora.QuantSpec(block_size=4), config)
  key, tokens = jax.random.key(0), jnp.arange(24).reshape(2, 12) * 5 % 96
  frozen, trainable = jlora.partition(
    key, make_params(config), spec, quant=quant
  )
  rng = np.random.default_rng(0)
  trainable = jax.tree.map(
    lambda x: x + rng.normal(0, 0.05, x.shape).astype('f4'), trainable
  )
  model = Decoder(config, remat='full')

  def apply(params):
    return model.apply({'params': params}, tokens)

  def loss(trainable, lifted):
    if lifted:
      lazy = jlora.combine(frozen, trainable, spec)
      return jnp.var(jlora.lift(apply, on_missing='error')(lazy))
    return jnp.var(apply(jlora.merge(frozen, trainable, spec)))

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
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
