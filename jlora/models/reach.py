"""What differs between layers that see everything and those that see a window.

All layers run in one scan, so that what differs is handed to it: a flag a
layer, and both forms of what depends on it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.models import rotary
from jlora.models.config import DecoderConfig


class Kinds(NamedTuple):
  """What differs from layer to layer; None where nothing does.

  Attributes:
    local: bool [layers], or of one layer: which see a window only.
    rotated: Likewise, which have rotary embeddings.
  """

  local: jax.Array | None
  rotated: jax.Array | None


class ByReach(NamedTuple):
  """Something that depends on how far a layer sees.

  Attributes:
    whole: For layers that see the whole sequence; None where none does.
    window: For those that see a window only; None where none does, or where it
      is the same.
  """

  whole: Any
  window: Any

  def of(self, local: jax.Array | None) -> Any:
    """Returns what one layer has.

    Args:
      local: From `Kinds`, of the layer.
    """
    if local is None or self.window is None or self.whole is None:
      return self.window if self.whole is None else self.whole

    def choose(window: jax.Array, whole: jax.Array) -> jax.Array:
      return jnp.where(local, window, whole)

    return jax.tree.map(choose, self.window, self.whole)


def kinds_of(config: DecoderConfig) -> Kinds:
  """Returns what differs between the layers of a decoder."""

  def mixed(chosen: tuple[int, ...], value: bool) -> jax.Array | None:
    if len(set(chosen)) in (0, config.layers):
      return None
    flags = jnp.full(config.layers, not value)
    return flags.at[jnp.array(chosen)].set(value)

  return Kinds(
    mixed(config.local_layers, True), mixed(config.unrotated_layers, False)
  )


def masks_of(
  config: DecoderConfig, mask: jax.Array, start: jax.Array | int = 0
) -> ByReach:
  """Returns which keys a query may see, bool [batch, queries, keys].

  Args:
    config: The decoder's.
    mask: bool [batch, queries, keys], of a layer that sees everything.
    start: int scalar; the place of the first query among the keys.
  """
  if not config.local_layers:
    return ByReach(mask, None)
  queries, keys = mask.shape[1:]
  places = start + jnp.arange(queries)
  distance = places[:, None] - jnp.arange(keys)[None]
  nearby = mask & (distance < config.sliding_window)[None]
  every = _all_local(config)
  return ByReach(None if every else mask, nearby)


def reach_of(
  config: DecoderConfig, local: jax.Array | None, length: int
) -> jax.Array | int | None:
  """Returns how many tokens a token sees in one layer, itself among them.

  Args:
    config: The decoder's.
    local: From `Kinds`, of the layer.
    length: The sequence's tokens.

  Returns:
    What `Sight` takes; None where the layer sees everything.
  """
  if not config.local_layers or length <= config.sliding_window:
    return None
  if _all_local(config):
    return config.sliding_window
  return jnp.where(local, config.sliding_window, length)


def turns_of(
  config: DecoderConfig, positions: jax.Array, length: int | None = None
) -> ByReach | None:
  """Returns the cosines and sines of rotary embeddings; None without them.

  Args:
    config: The decoder's.
    positions: int [batch, length].
    length: As for `rotary.angles`.
  """
  if config.learned_positions:
    return None
  turns = rotary.angles(positions, config, length)
  if config.local_rope_theta is None or not config.local_layers:
    return ByReach(turns, None)
  local = dataclasses.replace(
    config, rope_theta=config.local_rope_theta, rope_scaling=None
  )
  window = rotary.angles(positions, local)
  return ByReach(None if _all_local(config) else turns, window)


def _all_local(config: DecoderConfig) -> bool:
  return len(set(config.local_layers)) == config.layers
