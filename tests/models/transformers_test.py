"""Every family computes what transformers computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.decoder import Decoder, make_cache
from jlora.models.rope_scaling import LongScaling
from tests.decoders import (
  BUSIEST,
  assert_near,
  compiled,
  make_config,
  make_oracle,
  make_params,
)

torch = pytest.importorskip('torch')


def make_tokens(config, batch, length):
  rng = np.random.default_rng(length)
  return rng.integers(0, config.vocab_size, (batch, length))


def logits_of(oracle, tokens, **fields):
  with torch.no_grad():
    fields = {name: torch.tensor(x) for name, x in fields.items()}
    return oracle(torch.tensor(tokens), **fields).logits.numpy()


@functools.cache
def models_of(config):
  """Returns the parameters of a decoder, and the same in transformers."""
  params = make_params(config)
  return params, make_oracle(config, params)


def test_logits(family_config):
  params, oracle = models_of(family_config)
  tokens = make_tokens(family_config, 2, 40)
  positions = np.tile(np.arange(40), (2, 1))
  found = compiled(family_config)(
    {'params': params}, tokens, positions, np.zeros_like(tokens)
  )
  assert_near(found, logits_of(oracle, tokens))


def test_logits_behind_padding(family_config):
  params, oracle = models_of(family_config)
  tokens, padding = make_tokens(family_config, 2, 40), np.array([0, 6])
  real = np.arange(40) >= padding[:, None]
  positions = np.maximum(np.arange(40) - padding[:, None], 0)
  found = compiled(family_config)(
    {'params': params}, tokens, positions, real.astype(int)
  )
  expected = logits_of(
    oracle,
    tokens,
    attention_mask=real.astype(int),
    position_ids=positions,
  )
  assert_near(np.asarray(found)[real], expected[real])


def test_logits_of_packed_sequences(family_config):
  params, oracle = models_of(family_config)
  # Lengths of the sequences in a row, none beyond an original context.
  rows = [(5, 1, 16, 4, 14), (12, 12, 16)]
  parts = [[make_tokens(family_config, 1, n) for n in row] for row in rows]
  found = compiled(family_config)(
    {'params': params},
    np.concatenate([np.concatenate(row, axis=1) for row in parts]),
    np.stack([np.concatenate([*map(np.arange, row)]) for row in rows]),
    np.stack([np.repeat(np.arange(len(row)), row) for row in rows]),
  )
  expected = [
    np.concatenate([logits_of(oracle, part) for part in row], axis=1)
    for row in parts
  ]
  assert_near(found, np.concatenate(expected))


@pytest.mark.parametrize('name', [*BUSIEST, 'phi3 longrope'])
def test_greedy_tokens(name):
  config = make_config(name)
  # Where factors change with the length, they are those of the whole text.
  long = isinstance(config.rope_scaling, LongScaling)
  (params, oracle), new = models_of(config), 32
  prompt = make_tokens(config, 2, 20 if long else 9)
  expected = oracle.generate(
    torch.tensor(prompt),
    attention_mask=torch.ones(prompt.shape, dtype=torch.long),
    max_new_tokens=new,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )
  model, slots = Decoder(config), prompt.shape[1] + new
  decode = jax.jit(functools.partial(model.apply, method='decode'))
  cache, tokens = make_cache(config, 2, slots, jnp.float32), prompt
  known, start = [prompt], 0
  for _ in range(new):
    places = np.arange(start, start + tokens.shape[1])
    positions = np.tile(places, (2, 1))
    mask = np.arange(slots) <= positions[..., None]
    logits, cache = decode(
      {'params': params}, tokens, positions, mask, cache, jnp.int32(start)
    )
    start += tokens.shape[1]
    tokens = np.asarray(logits.argmax(-1))[:, None]
    known.append(tokens)
  np.testing.assert_array_equal(np.concatenate(known, axis=1), expected)
