"""Tunes a model that nobody here wrote: 4 bits and three steps of AdamW."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What tuning left.

  Attributes:
    loss: Of params and arguments, as the model computes it.
    spec: What was trained.
    frozen: The base in 4 bits.
    trainable: The adapters after the last step.
    losses: Before each step, and after the last.
  """

  loss: Callable[..., jax.Array]
  spec: jlora.LoraSpec
  frozen: Any
  trainable: Any
  losses: list[float]


@pytest.fixture(scope='session')
def tune():
  """Tunes every kernel that `infer_axes` finds; nothing may be formed."""

  def run(loss, params, *args):
    axes = jlora.infer_axes(loss, params, *args)
    fields = {'targets': tuple(path for path, _ in axes), 'axes': axes}
    spec = jlora.LoraSpec(rank=2, alpha=4.0, **fields)
    quant = jlora.QuantSpec(block_size=8, **fields)
    split = functools.partial(jlora.partition, spec=spec, quant=quant)
    frozen, trainable = jax.jit(split)(jax.random.key(0), params)
    lifted = jlora.lift(loss, on_missing='error')
    tx = optax.adamw(1e-2)

    def lazy_loss(trainable, frozen, *args):
      return lifted(jlora.combine(frozen, trainable, spec), *args)

    @jax.jit
    def step(trainable, opt_state, frozen, *args):
      value, grads = jax.value_and_grad(lazy_loss)(trainable, frozen, *args)
      updates, opt_state = tx.update(grads, opt_state, trainable)
      return optax.apply_updates(trainable, updates), opt_state, value

    opt_state, losses = tx.init(trainable), []
    for _ in range(4):
      before = trainable
      trainable, opt_state, value = step(trainable, opt_state, frozen, *args)
      losses.append(float(value))
    return Tuned(loss, spec, frozen, before, losses)

  return run


@pytest.fixture(scope='session')
def assert_lifted_equals_merged():
  """Checks value and gradient of a tuned model, within 1e-5 of each norm."""

  def run(tuned, *args):
    lifted = jlora.lift(tuned.loss, on_missing='error')

    @jax.jit
    def both(trainable, frozen, *args):
      def through(join, loss):
        def run(trainable):
          return loss(join(frozen, trainable, tuned.spec), *args)

        return jax.value_and_grad(run)(trainable)

      return through(jlora.combine, lifted), through(jlora.merge, tuned.loss)

    ours, theirs = both(tuned.trainable, tuned.frozen, *args)
    for mine, oracle in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
      assert np.any(oracle)
      difference = np.linalg.norm(np.asarray(mine) - np.asarray(oracle))
      assert difference <= 1e-5 * np.linalg.norm(oracle)

  return run


@pytest.fixture(scope='session')
def cross_entropy():
  """Mean loss of the next token."""

  def run(logits_BTV, tokens):
    logits_BTV = logits_BTV.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits_BTV[:, :-1], tokens[:, 1:]
    )
    return losses.mean()

  return run


@pytest.fixture(scope='session')
def roles():
  """Returns the roles of a spec's axes by path."""

  def run(spec):
    return {re.sub(r'\\(.)', r'\1', path): text for path, text in spec.axes}

  return run
