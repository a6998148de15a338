"""How the next token is chosen from logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jlora.errors import ConfigError

# Below this, 1 / temperature times a logit leaves float32.
_COLDEST = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: 0 takes the likeliest token; otherwise logits are divided by
      it before the softmax.
    top_k: Sample from the k likeliest tokens only.
    top_p: Sample from the fewest tokens, the likeliest first, whose
      probabilities (among the `top_k`) sum to this or more.
    max_new_tokens: Most tokens that follow a prompt.
    seed: Of the samples; a token depends on the seed, on which prompt it
      belongs to and on its position, not on the batch it was made in.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  max_new_tokens: int = 128
  seed: int = 0

  def __post_init__(self) -> None:
    """Refuses values that no sampling can have."""
    if self.temperature and not _COLDEST <= self.temperature < math.inf:
      raise ConfigError(
        f'temperature is {self.temperature}; use 0 for the likeliest token or'
        f' a finite value of {_COLDEST} or more'
      )
    if self.top_k is not None and self.top_k < 1:
      raise ConfigError(f'top_k is {self.top_k}; use 1 or more, or None')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ConfigError(
        f'top_p is {self.top_p}; use a value in (0, 1], or None'
      )
    if self.max_new_tokens < 1:
      raise ConfigError(
        f'max_new_tokens is {self.max_new_tokens}; use 1 or more'
      )


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns one token for each row.

  Args:
    logits: [batch, vocab].
    keys: [batch]; not looked at where the temperature is 0.
    sampling: How to choose.

  Returns:
    int32 [batch].

  References:
    Holtzman et al., `The Curious Case of Neural Text Degeneration
    <https://arxiv.org/abs/1904.09751>`_, section 3.1, for `top_p`.
  """
  if not sampling.temperature:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits.astype(jnp.float32) / sampling.temperature
  if sampling.top_k is None and sampling.top_p is None:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
  vocab = logits.shape[-1]
  kept, ids = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
  if sampling.top_p is not None:
    shares = jax.nn.softmax(kept, axis=-1)
    likelier = jnp.cumsum(shares, axis=-1) - shares
    kept = jnp.where(likelier < sampling.top_p, kept, -jnp.inf)
  rank = jax.vmap(jax.random.categorical)(keys, kept)
  return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0]
