import jax
import jax.numpy as jnp
import numpy as np

from jlora.inference import decoding
from jlora.inference.sampling import Sampling


def test_logits_do_not_depend_on_padding(model, params, config, prompts):
  def logits(padding):
    seen = []

    def apply(*args, **kwargs):
      logits, cache = model.apply(*args, **kwargs)
      seen.append(logits[0])
      return logits, cache

    @jax.jit
    def read(params, tokens):
      lengths = jnp.full(1, len(prompts[0]))
      zero, key = jnp.zeros(1, jnp.int32), jax.random.key(0)
      rows, state = decoding.start(setup, params, tokens, lengths, zero, key)
      for _ in range(3):
        state = decoding.advance(setup, params, rows, state)
      return jnp.stack(seen)

    setup = decoding.Setup(apply, config, Sampling(), (), jnp.dtype('float32'))
    tokens = np.concatenate([np.full(padding, 9), prompts[0]])[None]
    return read(params, tokens.astype(np.int32))

  plain = logits(0)
  whole = model.apply({'params': params}, jnp.asarray(prompts[0])[None])
  np.testing.assert_allclose(plain[0], whole[0, -1], atol=1e-5)
  np.testing.assert_allclose(logits(27), plain, atol=1e-5)
