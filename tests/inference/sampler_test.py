import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlora
from jlora.errors import ConfigError, DataError
from jlora.inference import sampler
from jlora.inference.sampler import generate, stream, text_pieces
from jlora.inference.sampling import Sampling
from jlora.models import families
from tests.decoders import make_oracle

GREEDY = Sampling(max_new_tokens=8)
SAMPLED = Sampling(max_new_tokens=8, temperature=1.0, seed=3)


@pytest.fixture
def run(model, params, config):
  def run(prompts, sampling=GREEDY, ends=(), batch_size=4, apply=model.apply):
    return generate(
      apply,
      params,
      config,
      prompts,
      sampling,
      eos_token_ids=ends,
      batch_size=batch_size,
      dtype=jnp.float32,
    )

  return run


def without_cache(model, params, prompt, count):
  """Greedy continuation by reading the whole sequence again and again."""
  tokens = list(prompt)
  forward = jax.jit(model.apply)
  padded = np.zeros((1, len(prompt) + count), np.int32)
  for _ in range(count):
    padded[0, : len(tokens)] = tokens
    logits = forward({'params': params}, padded)
    tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
  return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_transformers(config, params, prompts, run):
  torch = pytest.importorskip('torch')
  oracle = make_oracle(config, params)
  width = max(map(len, prompts))
  tokens = torch.zeros((len(prompts), width), dtype=torch.long)
  real = torch.zeros_like(tokens)
  for i, prompt in enumerate(prompts):
    tokens[i, width - len(prompt) :] = torch.from_numpy(prompt)
    real[i, width - len(prompt) :] = 1
  expected = oracle.generate(
    tokens,
    attention_mask=real,
    max_new_tokens=32,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )[:, width:].numpy()
  assert len(np.unique(expected)) > 16
  ours = run(prompts, Sampling(max_new_tokens=32))
  np.testing.assert_array_equal(np.stack(ours), expected)


def test_greedy_tokens_are_those_of_the_model_without_cache(
  model, params, prompts, run
):
  for prompt, tokens in zip(prompts, run(prompts), strict=True):
    assert tokens.tolist() == without_cache(model, params, prompt, 8)


def test_results_come_in_the_order_of_the_prompts(prompts, run):
  straight, backward = run(prompts), run(prompts[::-1])
  assert len({tuple(tokens) for tokens in straight}) == len(prompts)
  for one, other in zip(straight, backward[::-1], strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('sampling', [GREEDY, SAMPLED])
def test_results_do_not_depend_on_the_batch(prompts, run, sampling):
  alone = run(prompts, sampling, batch_size=1)
  for one, other in zip(
    alone, run(prompts, sampling, batch_size=4), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_samples_do_not_depend_on_the_bucket(monkeypatch, prompts, run):
  expected = run(prompts[:1], SAMPLED)
  monkeypatch.setattr(sampler, 'BUCKET', 48)
  np.testing.assert_array_equal(run(prompts[:1], SAMPLED), expected)


def test_a_row_stops_before_its_end_token(prompts, run):
  whole = run(prompts)
  ends = [int(whole[0][3]), int(whole[1][5])]
  cuts = run(prompts, ends=ends)
  assert len({len(cut) for cut in cuts}) > 1
  for full, cut in zip(whole, cuts, strict=True):
    stop = np.flatnonzero(np.isin(full, ends))
    np.testing.assert_array_equal(cut, full[: stop[0] if stop.size else None])


def test_nothing_is_read_once_all_rows_ended(config, params, prompts):
  calls = []

  def apply(variables, tokens, positions, mask, cache, index, method):
    jax.debug.callback(lambda: calls.append(1))
    # Token 5 follows from the third one on.
    likely = jnp.where(positions[:, -1] >= 2, 5, 4)
    return jax.nn.one_hot(likely, config.vocab_size), cache

  (tokens,) = generate(
    apply,
    params,
    config,
    [prompts[2]],
    GREEDY,
    eos_token_ids=[5],
    batch_size=2,
    dtype=jnp.float32,
  )
  jax.effects_barrier()
  assert tokens.tolist() == [4, 4]
  assert len(calls) == 3


def test_a_program_is_compiled_once_for_each_bucket(model, prompts, run):
  widths = []

  def apply(variables, tokens, *args, **kwargs):
    if tokens.shape[1] > 1:  # a prompt, not the loop's body
      widths.append(tokens.shape)
    return model.apply(variables, tokens, *args, **kwargs)

  for seed in range(2):
    sampling = Sampling(max_new_tokens=2, temperature=1.0, seed=seed)
    run(prompts, sampling, batch_size=2, apply=apply)
  assert widths == [(2, 32), (2, 64)]


def test_the_seed_decides_what_is_sampled(prompts, run):
  other = dataclasses.replace(SAMPLED, seed=4)
  first, again, moved = (
    np.stack(run(prompts, sampling)) for sampling in (SAMPLED, SAMPLED, other)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != moved).mean() > 0.5


def test_equal_prompts_are_sampled_apart(prompts, run):
  one, other = run([prompts[0], prompts[0]], SAMPLED)
  assert one.tolist() != other.tolist()


def test_one_new_token_is_enough(prompts, run):
  (longer,) = run(prompts[:1])
  (one,) = run(prompts[:1], Sampling(max_new_tokens=1))
  assert one.tolist() == [longer[0]]


def test_lazy_leaves_generate_what_merged_ones_do(
  model, params, config, prompts
):
  spec = families.resolve(jlora.LoraSpec(rank=2, alpha=8.0), config)
  quant = families.resolve(jlora.QuantSpec(block_size=16), config)
  frozen, trainable = jlora.partition(
    jax.random.key(0), params, spec, quant=quant
  )
  trainable = jax.tree.map(lambda x: x + 0.1, trainable)

  def run(apply, tree):
    return generate(
      apply,
      tree,
      config,
      prompts[2:5],
      GREEDY,
      eos_token_ids=(),
      batch_size=3,
      dtype=jnp.float32,
    )

  lazy = run(jlora.lift(model.apply), jlora.combine(frozen, trainable, spec))
  merged = run(model.apply, jlora.merge(frozen, trainable, spec))
  np.testing.assert_array_equal(np.stack(lazy), np.stack(merged))


@pytest.fixture
def stream_tokens(model, params, config):
  def run(prompt, sampling, ends):
    kwargs = {'eos_token_ids': ends, 'dtype': jnp.float32}
    return list(stream(model.apply, params, config, prompt, sampling, **kwargs))

  return run


@pytest.mark.parametrize('sampling', [GREEDY, SAMPLED])
def test_a_stream_yields_what_a_batch_does(
  params, prompts, run, stream_tokens, sampling
):
  (expected,) = run(prompts[1:2], sampling)
  expected = expected.tolist()
  assert stream_tokens(prompts[1], sampling, ()) == expected
  end = expected[-1]
  until = expected[: expected.index(end)]
  assert stream_tokens(prompts[1], sampling, [end]) == until
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ('prompt', 'words'),
  [
    ([], 'prompt 0 is float64 of shape'),
    ([[1, 2]], 'one axis'),
    ([1.0], 'integer ids'),
    ([1, 97], 'holds the token 97'),
    ([-1], 'holds the token -1'),
    ([1] * 249, '249 tokens with 8 new ones exceeds the 256'),
  ],
)
def test_an_impossible_prompt_is_refused(run, prompt, words):
  with pytest.raises(DataError, match=words):
    run([np.asarray(prompt)])


def test_the_longest_possible_prompt_is_continued(run):
  assert run([np.ones(248, int)])[0].shape == (8,)


def test_no_prompts_give_no_results(run):
  assert run([]) == []


def test_a_batch_of_no_rows_is_refused(run, prompts):
  with pytest.raises(ConfigError, match='batch_size is 0'):
    run(prompts, batch_size=0)


def decode_bytes(tokens):
  return bytes(tokens).decode(errors='replace')


@given(st.binary(max_size=40))
def test_pieces_of_any_bytes_join_to_their_text(tokens):
  assert ''.join(text_pieces(tokens, decode_bytes)) == decode_bytes(tokens)


@given(st.text(max_size=20))
def test_a_piece_of_valid_text_is_a_whole_character(text):
  pieces = list(text_pieces(text.encode(), decode_bytes))
  assert ''.join(pieces) == text
  if '\ufffd' not in text:
    assert pieces == list(text)
