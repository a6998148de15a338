"""Blockwise attention is attention, and its scratch grows as the length."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import tiles
from jlora.models.attention import attend
from jlora.models.blockwise import Sight, attend_blockwise
from jlora.models.decoder import Decoder
from tests.decoders import CONFIG

BATCH, HEADS, WIDTH = 2, 4, 8
# Length, key-value heads, segments a row, window, whether it is traced, cap.
CASES = {
  'one block': (7, 4, 1, None, False, None),
  'short': (30, 2, 3, None, False, 0.5),
  'window, short': (32, 1, 1, 11, False, None),
  'many tiles': (55, 1, 1, None, False, None),
  'window': (64, 2, 1, 11, False, None),
  'window of some layers': (55, 2, 3, 11, True, 0.5),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """Blocks of 16 tokens, and a loop written out up to 32."""
  for name, value in {
    '_BLOCK': 16,
    '_SHORT_BLOCK': 16,
    '_UNROLLED': 32,
  }.items():
    monkeypatch.setattr(tiles, name, value)


def make_operands(length, kv_heads, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  heads = (HEADS, kv_heads, kv_heads)
  shapes = [(BATCH, length, n, WIDTH) for n in heads]
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def make_segments(length, count, seed=0):
  """Rows of `count` segments each, cut at different places."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(np.sort(rng.integers(0, count, (BATCH, length)), axis=1))


def plain(q, k, v, segments, window, cap):
  """Attention with all scores at once."""
  places = jnp.arange(q.shape[1])
  distance = places[:, None] - places[None]
  mask = (distance >= 0) & (distance < (window or q.shape[1]))
  mask = mask[None] & (segments[:, :, None] == segments[:, None])
  return attend(q, k, v, mask, scale=0.4, cap=cap)


def blockwise(q, k, v, segments, reach, cap):
  return attend_blockwise(q, k, v, Sight(segments, reach), scale=0.4, cap=cap)


def value_and_grads(fn, operands, *rest):
  """Returns what attention gives, and its gradients in random directions."""

  def run(operands, direction):
    out, pull = jax.vjp(lambda *x: fn(*x, *rest), *operands)
    return out, pull(direction.astype(out.dtype))

  length = operands[0].shape[1]
  rng = np.random.default_rng(9)
  shape = (BATCH, length, HEADS * WIDTH)
  return jax.jit(run)(operands, jnp.asarray(rng.standard_normal(shape)))


def distances(found, expected):
  """Returns the largest difference of each, relative to the largest value."""
  return [
    float(jnp.abs(a - b).max() / jnp.abs(b).max())
    for a, b in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    )
  ]


@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_are_those_of_all_scores_at_once(case):
  length, kv_heads, count, window, traced, cap = CASES[case]
  operands = make_operands(length, kv_heads)
  segments = make_segments(length, count)
  reach = jnp.int32(window) if traced else window
  known = None if count == 1 else segments
  found = value_and_grads(blockwise, operands, known, reach, cap)
  expected = value_and_grads(plain, operands, segments, window, cap)
  # Sums over up to 64 keys or 4 * 64 queries, rounded in another order.
  assert max(distances(found, expected)) < 32 * 2**-24


@pytest.mark.parametrize('length', [30, 55])
def test_in_bfloat16_it_is_as_near_to_float32_as_all_scores_at_once(length):
  segments = make_segments(length, 3)
  exact = value_and_grads(plain, make_operands(length, 2), segments, None, None)
  operands = make_operands(length, 2, jnp.bfloat16)
  arms = [
    distances(value_and_grads(fn, operands, segments, None, None), exact)
    for fn in (blockwise, plain)
  ]
  # Weights and their gradients are rounded to 8 bits, as there.
  assert max(arms[0]) < 1.5 * max(arms[1]) < 6 * 2**-8


@pytest.mark.parametrize('length', [30, 55])
def test_no_result_depends_on_what_is_not_seen(length):
  q, k, v = make_operands(length, 2)
  segments = make_segments(length, 2)[:1]
  row, window = length - 2, 9

  def total(k, v):
    out = attend_blockwise(q[:1], k, v, Sight(segments, window))
    return out[0, row].sum()

  grads = jax.jit(jax.grad(total, (0, 1)))(k[:1], v[:1])
  first = int((segments[0] == segments[0, row]).argmax())
  seen = np.arange(length) > max(first - 1, row - window)
  seen &= np.arange(length) <= row
  for grad in grads:
    moved = np.abs(grad[0]).sum(axis=(1, 2)) > 0
    assert moved.tolist() == seen.tolist()


def test_tiles_that_hold_nothing_are_left_out():
  whole, window = (tiles.make_tiling(128, w) for w in (None, 17))
  assert len(whole.pairs) == 8 * 9 // 2
  assert window.pairs == [
    (i, j) for i in range(8) for j in (i, i - 1) if j >= 0
  ]
  segments = jnp.repeat(jnp.arange(4), 32)[None]  # of two blocks each
  needed = whole.needed(segments, None)
  assert [p for p, hit in zip(whole.pairs, needed, strict=True) if hit] == [
    (i, j) for i, j in whole.pairs if i // 2 == j // 2
  ]
  near = whole.needed(None, jnp.int32(17)).tolist()
  assert near == [i - j <= 1 for i, j in whole.pairs]


LONG = dataclasses.replace(
  CONFIG,
  vocab_size=64,
  embed_dim=32,
  mlp_dim=64,
  heads=4,
  head_dim=8,
  max_positions=8192,
)


def compiled_step(length, remat):
  model = Decoder(LONG, remat=remat)
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)

  def loss(params, tokens, segments):
    hidden = functools.partial(model.apply, method='hidden')
    return hidden(params, tokens, segment_ids=segments).var()

  step = jax.jit(jax.grad(loss)).lower(params, tokens, tokens)
  return step.compile()


def test_scratch_grows_as_the_length_does(monkeypatch):
  monkeypatch.undo()
  short, long = (compiled_step(length, 'full') for length in (1024, 8192))
  ratio = (
    long.memory_analysis().temp_size_in_bytes
    / short.memory_analysis().temp_size_in_bytes
  )
  assert ratio <= 8.5
  shapes = re.findall(r'[a-z]\d*\[([\d,]+)\]', long.as_text())
  assert not any(s.split(',').count('8192') > 1 for s in shapes)
