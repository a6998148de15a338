"""The compiled part of generation: prompts read at once, then token by token.

Prompts are padded on the left. Slot s of a row whose prompt starts at slot
`start` holds position s - start; the slots before `start` are never attended
to.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.inference.sampling import Sampling, choose
from jlora.models.attention import Cache
from jlora.models.config import DecoderConfig
from jlora.models.decoder import make_cache

# Stands behind the end of a row; no token has this id.
NOTHING = -1


class Setup(NamedTuple):
  """Everything beside shapes that decides which program is compiled.

  Attributes:
    apply: A decoder's, or its lifted form.
    config: The decoder's.
    sampling: How tokens are chosen; its seed is the `key` of a call instead.
    eos_token_ids: Tokens that end a row, sorted.
    dtype: Of the cache.
  """

  apply: Callable[..., Any]
  config: DecoderConfig
  sampling: Sampling
  eos_token_ids: tuple[int, ...]
  dtype: np.dtype


class Rows(NamedTuple):
  """What stays the same for each row.

  Attributes:
    start: int [batch]; the slot of the prompt's first token.
    keys: [batch] keys, one for each example.
  """

  start: jax.Array
  keys: jax.Array


class State(NamedTuple):
  """What one token changes.

  Attributes:
    token: int [batch]; the latest, chosen but not yet read.
    slot: int scalar; where `token` will be read to.
    done: bool [batch]; whether the row has ended, `token` included.
    cache: Keys and values of the slots before.
  """

  token: jax.Array
  slot: jax.Array
  done: jax.Array
  cache: Cache


@functools.partial(jax.jit, static_argnums=0)
def run(
  setup: Setup,
  params: Any,
  tokens: jax.Array,
  lengths: jax.Array,
  examples: jax.Array,
  key: jax.Array,
) -> jax.Array:
  """Generates until every row has ended.

  Args:
    setup: Static.
    params: What `setup.apply` takes as 'params'.
    tokens: int [batch, width]; prompts that end in the last column.
    lengths: int [batch]; of the prompts, 0 for a row without one.
    examples: int [batch]; numbers that tell the rows' random keys apart.
    key: Of all examples.

  Returns:
    int32 [batch, max_new_tokens]: new tokens, then `NOTHING` from the token
    that ended the row on.
  """
  batch, width = tokens.shape
  count = setup.sampling.max_new_tokens
  rows, state = start(setup, params, tokens, lengths, examples, key)

  def write(out: jax.Array, state: State) -> jax.Array:
    column = jnp.where(state.done, NOTHING, state.token)[:, None]
    at = (0, state.slot - width)
    return jax.lax.dynamic_update_slice(out, column, at)

  def going(carry: tuple[State, jax.Array]) -> jax.Array:
    state, _ = carry
    more = state.slot + 1 < width + count
    return jnp.logical_and(more, jnp.logical_not(state.done.all()))

  def body(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
    state, out = carry
    state = advance(setup, params, rows, state)
    return state, write(out, state)

  out = jnp.full((batch, count), NOTHING, jnp.int32)
  _, out = jax.lax.while_loop(going, body, (state, write(out, state)))
  return out


def start(
  setup: Setup,
  params: Any,
  tokens: jax.Array,
  lengths: jax.Array,
  examples: jax.Array,
  key: jax.Array,
) -> tuple[Rows, State]:
  """Reads the prompts and chooses the first new tokens; as in `run`."""
  batch, width = tokens.shape
  slots = width + setup.sampling.max_new_tokens - 1  # the last is never read
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
  rows = Rows(width - lengths, keys)
  cache = make_cache(setup.config, batch, slots, setup.dtype)
  state = State(tokens[:, -1], jnp.int32(0), lengths == 0, cache)
  return rows, _read(setup, params, rows, state, tokens)


def advance(setup: Setup, params: Any, rows: Rows, state: State) -> State:
  """Reads the latest token of each row and chooses the next."""
  return _read(setup, params, rows, state, state.token[:, None])


def _read(
  setup: Setup, params: Any, rows: Rows, state: State, tokens: jax.Array
) -> State:
  """Reads tokens [batch, length] into the slots from `state.slot` on."""
  slots = jnp.arange(state.cache[0].shape[2])[None, None]
  reading = (state.slot + jnp.arange(tokens.shape[1]))[None, :, None]
  first = rows.start[:, None, None]
  mask = jnp.logical_and(slots >= first, slots <= reading)
  positions = jnp.maximum(reading - first, 0)[:, :, 0]
  logits, cache = setup.apply(
    {'params': params},
    tokens,
    positions,
    mask,
    state.cache,
    state.slot,
    method='decode',
  )
  slot = state.slot + tokens.shape[1]
  keys = jax.vmap(jax.random.fold_in)(rows.keys, slot - rows.start)
  token = choose(logits, keys, setup.sampling)
  ends = jnp.asarray(setup.eos_token_ids, jnp.int32)
  done = jnp.logical_or(state.done, jnp.isin(token, ends))
  return State(token, slot, done, cache)


start_alone = jax.jit(start, static_argnums=0)
# The state is the stream's own, so its cache is written in place.
advance_alone = jax.jit(advance, static_argnums=0, donate_argnums=3)
