"""Tunes a model that nobody here wrote: 4 bits and three steps of AdamW."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora.core import tree
from jlora.core.quantized import is_quantized


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What tuning left.

  Attributes:
    loss: Of params and arguments, as the model computes it.
    spec: What was trained.
    frozen: The base in 4 bits.
    trainable: The adapters after the last step.
    found: The lifted loss of these, and its gradient.
    losses: Before each step, and after the last.
  """

  loss: Callable[..., jax.Array]
  spec: jlora.LoraSpec
  frozen: Any
  trainable: Any
  found: tuple[jax.Array, Any]
  losses: list[float]


def value_and_grad(loss, join, spec):
  """Returns the loss and its gradient as a function of both halves."""

  def of_halves(trainable, frozen, *args):
    return loss(join(frozen, trainable, spec), *args)

  return jax.value_and_grad(of_halves)


@pytest.fixture(scope='session')
def tune(quick_jit):
  """Tunes every kernel that `infer_axes` finds; nothing may be formed."""

  def run(loss, params, *args):
    axes = jlora.infer_axes(loss, params, *args)
    fields = {'targets': tuple(path for path, _ in axes), 'axes': axes}
    spec = jlora.LoraSpec(rank=2, alpha=4.0, **fields)
    quant = jlora.QuantSpec(block_size=8, **fields)
    split = functools.partial(jlora.partition, spec=spec, quant=quant)
    frozen, trainable = quick_jit(split)(jax.random.key(0), params)
    lifted = jlora.lift(loss, on_missing='error')
    gradient = value_and_grad(lifted, jlora.combine, spec)
    tx = optax.adamw(1e-2)

    @quick_jit
    def step(trainable, opt_state, frozen, *args):
      found = gradient(trainable, frozen, *args)
      updates, opt_state = tx.update(found[1], opt_state, trainable)
      return optax.apply_updates(trainable, updates), opt_state, found

    opt_state, losses = tx.init(trainable), []
    for _ in range(4):
      before = trainable
      trainable, opt_state, found = step(trainable, opt_state, frozen, *args)
      losses.append(float(found[0]))
    return Tuned(loss, spec, frozen, before, found, losses)

  return run


@pytest.fixture(scope='session')
def assert_lifted_equals_merged(quick_jit, assert_near):
  """Checks value and gradient of a tuned model."""

  def run(tuned, *args):
    merged = quick_jit(value_and_grad(tuned.loss, jlora.merge, tuned.spec))
    assert_near(tuned.found, merged(tuned.trainable, tuned.frozen, *args))

  return run


@pytest.fixture(scope='session')
def assert_kernels_are_in_4_bits():
  """Checks that nothing of two axes or more is left in full precision."""

  def run(tuned):
    for path, leaf in tree.leaves_by_path(tuned.frozen, is_quantized).items():
      assert is_quantized(leaf) == (len(leaf.shape) > 1), path

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
