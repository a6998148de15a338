import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.core.tree import leaves_by_path
from jlora.models import layout
from jlora.models.decoder import Decoder, make_cache
from jlora.models.rope_scaling import Llama3Scaling
from tests.decoders import CONFIG, make_params

SCALING = Llama3Scaling(factor=8.0, original_max_positions=32)


def make_tokens(batch, length, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, CONFIG.vocab_size, (batch, length)))


def test_initialized_params_have_the_documented_tree():
  for tied in (True, False):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    init = functools.partial(Decoder(config).init, jax.random.key(0))
    tree = jax.eval_shape(init, make_tokens(1, 4))['params']
    shapes = {path: x.shape for path, x in leaves_by_path(tree).items()}
    assert shapes == {w.path: w.shape for w in layout.weights(config)}


def test_packed_segments_equal_separate_sequences():
  params = {'params': make_params(CONFIG)}
  apply = jax.jit(Decoder(CONFIG).apply)
  lengths = (5, 1, 9)
  parts = [make_tokens(1, n, seed=n) for n in lengths]
  packed = apply(
    params,
    jnp.concatenate(parts, axis=1),
    jnp.concatenate([jnp.arange(n)[None] for n in lengths], axis=1),
    jnp.repeat(jnp.arange(3), jnp.array(lengths))[None],
  )
  alone = [apply(params, part) for part in parts]
  np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


def test_cached_decoding_equals_a_whole_forward_pass():
  config = dataclasses.replace(CONFIG, rope_scaling=SCALING)
  model, params = Decoder(config), {'params': make_params(config)}
  tokens, slots, prompt = make_tokens(2, 12), 16, 7
  whole = jax.jit(model.apply)(params, tokens)
  decode = jax.jit(functools.partial(model.apply, method='decode'))
  cache = make_cache(config, 2, slots, jnp.float32)
  steps = [(0, prompt), *((i, i + 1) for i in range(prompt, 12))]
  for start, stop in steps:
    positions = jnp.tile(jnp.arange(start, stop), (2, 1))
    mask = jnp.arange(slots)[None, None] <= positions[..., None]
    logits, cache = decode(
      params,
      tokens[:, start:stop],
      positions,
      mask,
      cache,
      jnp.int32(start),
    )
    np.testing.assert_allclose(logits, whole[:, stop - 1], atol=1e-5)


def test_no_logit_depends_on_a_later_token():
  params, model = make_params(CONFIG), Decoder(CONFIG)
  tokens = jnp.arange(8)[None]

  def logit(embedding, position):
    tree = {**params, 'embed': {'embedding': embedding}}
    hidden = model.apply({'params': tree}, tokens, method='hidden')
    return hidden[0, position].sum()

  embedding = jnp.asarray(params['embed']['embedding'])
  grad = jax.jit(jax.grad(logit))
  for position in (0, 3, 7):
    moved = jnp.abs(grad(embedding, position)).sum(axis=1)[:8]
    assert (moved[: position + 1] > 0).all()
    assert (moved[position + 1 :] == 0).all()


def test_no_logit_depends_on_another_segment():
  params, model = make_params(CONFIG), Decoder(CONFIG)
  tokens, segments = jnp.arange(8)[None], jnp.array([[0, 0, 0, 1, 1, 1, 1, 2]])

  def last(embedding):
    tree = {**params, 'embed': {'embedding': embedding}}
    hidden = model.apply(
      {'params': tree}, tokens, segment_ids=segments, method='hidden'
    )
    return hidden[0, 6].sum()

  embedding = jnp.asarray(params['embed']['embedding'])
  moved = jnp.abs(jax.jit(jax.grad(last))(embedding)).sum(axis=1)[:8]
  assert (moved > 0).tolist() == [False] * 3 + [True] * 4 + [False]


def test_positions_matter_only_relative_to_each_other():
  params = {'params': make_params(CONFIG)}
  apply = jax.jit(Decoder(CONFIG).apply)
  tokens = make_tokens(1, 10)
  positions = jnp.arange(10)[None]
  np.testing.assert_allclose(
    apply(params, tokens, positions),
    apply(params, tokens, positions + 40),
    atol=1e-4,
  )


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_rematerializing_and_unrolling_change_no_gradient(remat):
  params, tokens = make_params(CONFIG), make_tokens(2, 9)

  def loss(params, model):
    return model.apply({'params': params}, tokens).astype(jnp.float32).var()

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  expected = grad(params, Decoder(CONFIG))
  found = grad(params, Decoder(CONFIG, remat=remat, unroll=3))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
  )


def test_bfloat16_computes_in_bfloat16():
  params = {'params': make_params(CONFIG)}
  tokens = make_tokens(1, 6)
  logits = jax.jit(Decoder(CONFIG, dtype=jnp.bfloat16).apply)(params, tokens)
  assert logits.dtype == jnp.bfloat16
  exact = jax.jit(Decoder(CONFIG).apply)(params, tokens)
  # 8 bits of mantissa over 3 layers.
  assert jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()
