"""A residual network of convolutions, as its author would write it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jlora
from jlora.core import tree
from jlora.core.quantized import is_quantized


class ResidualBlock(nn.Module):
  channels: int
  strides: int
  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x):
    y = self.conv(self.channels, (3, 3), strides=self.strides)(x)
    y = nn.relu(self.norm()(y))
    y = self.conv(self.channels, (3, 3))(y)
    y = self.norm(scale_init=nn.initializers.constant(0.5))(y)
    if x.shape != y.shape:
      x = self.conv(self.channels, (1, 1), strides=self.strides)(x)
      x = self.norm(name='norm_projection')(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  classes: int = 5

  @nn.compact
  def __call__(self, images, train: bool):
    conv = functools.partial(nn.Conv, use_bias=False)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9
    )
    x = nn.relu(norm()(conv(8, (3, 3), name='stem')(images)))
    x = nn.max_pool(x, (2, 2), strides=(2, 2))
    for channels, strides in ((8, 1), (12, 2)):
      x = ResidualBlock(channels, strides, conv, norm)(x)
    x = nn.Dropout(0.2, deterministic=not train)(x.mean(axis=(1, 2)))
    return nn.Dense(self.classes, name='head')(x)


IMAGES = jax.random.normal(jax.random.key(0), (10, 8, 8, 3))
LABELS = jnp.arange(10) % 5
KEY = jax.random.key(3)  # of dropout, the same in every step


@pytest.fixture(scope='module')
def variables(quick_jit):
  init = quick_jit(ResNet().init, static_argnames='train')
  return init(jax.random.key(1), IMAGES, train=False)


@pytest.fixture(scope='module')
def fields(variables):
  """Every kernel but that of the head, and what their axes are for."""

  def logits(params, images):
    return ResNet().apply({**variables, 'params': params}, images, False)

  axes = jlora.infer_axes(logits, variables['params'], IMAGES)
  return {'axes': axes, 'exclude': 'head/kernel'}


@pytest.fixture(scope='module')
def spec(fields):
  whole = ('head/.*', '.*/(scale|bias)')
  return jlora.LoraSpec(rank=3, alpha=6.0, train_full=whole, **fields)


@pytest.fixture(scope='module')
def halves(variables, fields, spec, quick_jit):
  quant = jlora.QuantSpec(block_size=8, axes=fields['axes'])
  split = functools.partial(jlora.partition, spec=spec, quant=quant)
  return quick_jit(split)(jax.random.key(2), variables['params'])


def make_gradient(spec, join, apply):
  """Returns loss and new batch statistics, and the loss' gradient."""

  def loss(trainable, frozen, statistics):
    variables = {
      'params': join(frozen, trainable, spec),
      'batch_stats': statistics,
    }
    logits, new = apply(
      variables, IMAGES, True, rngs={'dropout': KEY}, mutable=['batch_stats']
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return losses.mean(), new['batch_stats']

  return jax.value_and_grad(loss, has_aux=True)


@dataclasses.dataclass(frozen=True)
class Step:
  """What one step starts from, and what it finds there."""

  trainable: Any
  statistics: Any
  found: Any  # loss and new statistics, and the gradient

  @property
  def loss(self):
    (loss, _), _ = self.found
    return float(loss)


@pytest.fixture(scope='module')
def steps(variables, spec, halves, quick_jit):
  """Three steps of AdamW, and what a fourth would start from."""
  apply = jlora.lift(ResNet().apply, on_missing='error')
  gradient = make_gradient(spec, jlora.combine, apply)
  tx = optax.adamw(3e-3)

  @quick_jit
  def step(trainable, opt_state, statistics, frozen):
    found = gradient(trainable, frozen, statistics)
    updates, opt_state = tx.update(found[1], opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, found

  frozen, trainable = halves
  opt_state, statistics = tx.init(trainable), variables['batch_stats']
  seen = []
  for _ in range(4):
    new, opt_state, found = step(trainable, opt_state, statistics, frozen)
    seen.append(Step(trainable, statistics, found))
    trainable, ((_, statistics), _) = new, found
  return seen


def test_three_steps_lower_the_loss(steps):
  losses = [step.loss for step in steps]
  assert losses == sorted(set(losses), reverse=True)


def test_every_convolution_is_in_4_bits_and_has_an_adapter(halves):
  frozen, trainable = halves
  kinds = tree.leaves_by_path(jlora.labels(trainable))
  for path, leaf in tree.leaves_by_path(frozen, is_quantized).items():
    if path.endswith('kernel') and path != 'head/kernel':
      assert is_quantized(leaf), path
      assert kinds.keys() >= {f'{path}/a', f'{path}/b'}
    else:
      assert f'{path}/full' in kinds


def test_loss_gradient_and_statistics_are_those_of_merge(
  steps, spec, halves, quick_jit, assert_near
):
  last = steps[-1]
  merged = quick_jit(make_gradient(spec, jlora.merge, ResNet().apply))
  theirs = merged(last.trainable, halves[0], last.statistics)
  assert_near(last.found, theirs)


def test_statistics_are_used_where_the_flag_says_so(
  steps, spec, halves, quick_jit
):
  lifted = jlora.lift(ResNet().apply, on_missing='error')

  @quick_jit
  def together_and_alone(trainable, statistics, frozen):
    params = jlora.combine(frozen, trainable, spec)
    variables = {'params': params, 'batch_stats': statistics}
    return [lifted(variables, images, False) for images in (IMAGES, IMAGES[:1])]

  last = steps[-1]
  together, alone = together_and_alone(
    last.trainable, last.statistics, halves[0]
  )
  np.testing.assert_allclose(together[:1], alone, atol=1e-5)
