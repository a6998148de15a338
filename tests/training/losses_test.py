import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core.axes import parse_roles
from jlora.core.quantization import quantize_leaf
from jlora.training.losses import summed_cross_entropy

SHAPE, EMBED, VOCAB = (3, 11), 16, 40
CHUNKS = [1, 4, 11, 33, 1000]


def tied(params, h):
  return h @ params['embedding'].T


def untied(params, h):
  return h @ params['kernel']


def plain(logits_fn, params, hidden, targets, mask):
  log_probs = jax.nn.log_softmax(logits_fn(params, hidden), axis=-1)
  chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
  return -jnp.sum(mask * chosen)


def chunked(chunk, frozen_head):
  return functools.partial(
    summed_cross_entropy, chunk=chunk, frozen_head=frozen_head
  )


@pytest.fixture(scope='module')
def inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (*SHAPE, EMBED))
  targets = jax.random.randint(keys[1], SHAPE, 0, VOCAB)
  mask = jax.random.uniform(keys[2], SHAPE).at[:, ::3].set(0)
  return hidden, targets, mask


@pytest.fixture(scope='module')
def params():
  embedding = jax.random.normal(jax.random.key(1), (VOCAB, EMBED))
  return {'embedding': embedding, 'kernel': embedding.T}


def value_and_grad(loss, logits_fn, params, inputs):
  run = jax.value_and_grad(functools.partial(loss, logits_fn), (0, 1))
  return jax.jit(run)(params, *inputs)


def assert_near(ours, theirs):
  check = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
  jax.tree.map(check, ours, theirs)


@pytest.mark.parametrize('chunk', CHUNKS)
def test_a_tied_frozen_head_gives_plain_cross_entropy(inputs, params, chunk):
  value, (_, ours) = value_and_grad(chunked(chunk, True), tied, params, inputs)
  expected, (_, theirs) = value_and_grad(plain, tied, params, inputs)
  assert_near((value, ours), (expected, theirs))


@pytest.mark.parametrize('chunk', CHUNKS)
def test_a_trained_head_gives_plain_cross_entropy(inputs, params, chunk):
  ours = value_and_grad(chunked(chunk, False), untied, params, inputs)
  assert_near(ours, value_and_grad(plain, untied, params, inputs))


@pytest.mark.parametrize('frozen_head', [True, False])
def test_the_value_alone_is_that_of_value_and_grad(inputs, params, frozen_head):
  loss = chunked(4, frozen_head)
  value, _ = value_and_grad(loss, tied, params, inputs)
  assert_near(loss(tied, params, *inputs), value)


def test_a_quantized_head_runs_through_lift(inputs, params):
  head = quantize_leaf(
    params['kernel'],
    parse_roles('embed -> vocab'),
    jlora.QuantSpec(block_size=8),
  )
  lifted = jlora.lift(untied, on_missing='error')
  dense = {'kernel': jlora.dequantize(head)}

  def ours(hidden):
    loss = chunked(4, True)
    return loss(lifted, {'kernel': head}, hidden, *inputs[1:])

  def theirs(hidden):
    return plain(untied, dense, hidden, *inputs[1:])

  assert_near(
    jax.value_and_grad(ours)(inputs[0]), jax.value_and_grad(theirs)(inputs[0])
  )


@pytest.mark.parametrize('frozen_head', [True, False])
def test_a_masked_token_has_neither_loss_nor_gradient(params, frozen_head):
  hidden = jax.random.normal(jax.random.key(0), (1, 5, EMBED))
  targets = jnp.zeros((1, 5), jnp.int32)
  mask = jnp.array([[1.0, 1, 0, 1, 0]])

  def loss(hidden):
    run = chunked(2, frozen_head)
    return run(tied, params, hidden, targets, mask)

  grad = jax.grad(loss)(hidden)
  assert np.any(grad[0, [0, 1, 3]], axis=-1).all()
  assert not np.any(grad[0, [2, 4]])
  moved = hidden.at[0, 2].add(5.0)
  np.testing.assert_array_equal(loss(moved), loss(hidden))


@pytest.mark.parametrize('frozen_head', [True, False])
def test_large_logits_stay_finite(params, inputs, frozen_head):
  hidden = 1e4 * inputs[0]
  loss = chunked(4, frozen_head)
  value, grads = value_and_grad(loss, tied, params, (hidden, *inputs[1:]))
  assert np.isfinite(value)
  assert np.isfinite(grads[1]).all()


@pytest.mark.parametrize('frozen_head', [True, False])
def test_the_loss_of_bfloat16_logits_is_float32(params, inputs, frozen_head):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  hidden = inputs[0].astype(jnp.bfloat16)
  loss = chunked(4, frozen_head)
  value, grads = value_and_grad(loss, tied, half, (hidden, *inputs[1:]))
  assert value.dtype == jnp.float32
  assert grads[1].dtype == jnp.bfloat16
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (half, hidden))
  logits = tied(*wide).astype(jnp.bfloat16).astype(jnp.float32)
  expected = plain(lambda _, h: h, None, logits, *inputs[1:])
  np.testing.assert_allclose(value, expected, rtol=1e-3)


@pytest.mark.parametrize(('frozen_head', 'times'), [(True, 1.3), (False, 3)])
def test_logits_exist_for_one_chunk_only(frozen_head, times):
  tokens, vocab, chunk = 4096, 8192, 64

  def loss(params, hidden, targets, mask):
    run = chunked(chunk, frozen_head)
    return run(untied, params, hidden, targets, mask)

  compiled = (
    jax.jit(jax.grad(loss, 1))
    .lower(
      {'kernel': jax.ShapeDtypeStruct((EMBED, vocab), jnp.float32)},
      jax.ShapeDtypeStruct((1, tokens, EMBED), jnp.float32),
      jax.ShapeDtypeStruct((1, tokens), jnp.int32),
      jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    )
    .compile()
  )
  logits = 4 * vocab * chunk
  # Exponentials and gradient take the place of a chunk's logits where the head
  # is frozen. All of them would be 64 times this.
  assert compiled.memory_analysis().temp_size_in_bytes <= times * logits


@pytest.mark.parametrize('frozen_head', [True, False])
@pytest.mark.parametrize('trained', [0, 1, 5])
def test_logits_are_made_of_chunks_with_a_trained_token_only(
  params, frozen_head, trained
):
  counted = []

  def counting(params, h):
    jax.debug.callback(lambda: counted.append(len(h)))
    return tied(params, h)

  hidden = jax.random.normal(jax.random.key(0), (2, 12, EMBED))
  targets = jnp.zeros((2, 12), jnp.int32)
  # Scattered over both rows, at most `trained` in one.
  mask = jnp.zeros((2, 12)).at[0, 1 : 1 + 2 * trained : 2].set(1)
  mask = mask.at[1, 11].set(min(trained, 1))
  run = chunked(4, frozen_head)
  jax.block_until_ready(run(counting, params, hidden, targets, mask))
  jax.effects_barrier()
  assert counted == [4] * -(-trained // 2)
