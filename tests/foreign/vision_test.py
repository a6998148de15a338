"""A residual network of convolutions, as its author would write it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jlora
from jlora.core import tree
from jlora.core.quantized import is_quantized

pytestmark = pytest.mark.slow


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
KEY = jax.random.key(3)


@pytest.fixture(scope='module')
def variables():
  init = jax.jit(ResNet().init, static_argnames='train')
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
def halves(variables, fields, spec):
  quant = jlora.QuantSpec(block_size=8, axes=fields['axes'])
  split = functools.partial(jlora.partition, spec=spec, quant=quant)
  return jax.jit(split)(jax.random.key(2), variables['params'])


def make_gradient(spec, join, apply):
  """Returns loss and new batch statistics, and the loss' gradient."""

  def loss(trainable, frozen, statistics, key):
    variables = {
      'params': join(frozen, trainable, spec),
      'batch_stats': statistics,
    }
    logits, new = apply(
      variables, IMAGES, True, rngs={'dropout': key}, mutable=['batch_stats']
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return losses.mean(), new['batch_stats']

  return jax.value_and_grad(loss, has_aux=True)


@pytest.fixture(scope='module')
def trained(variables, spec, halves):
  """Adapters, batch statistics and the loss of every step."""
  apply = jlora.lift(ResNet().apply, on_missing='error')
  gradient = make_gradient(spec, jlora.combine, apply)
  tx = optax.adamw(3e-3)

  @jax.jit
  def step(trainable, opt_state, statistics, frozen, key):
    (loss, statistics), grads = gradient(trainable, frozen, statistics, key)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    return trainable, opt_state, statistics, loss

  frozen, trainable = halves
  opt_state, statistics = tx.init(trainable), variables['batch_stats']
  losses = []
  for _ in range(4):
    trainable, opt_state, statistics, loss = step(
      trainable, opt_state, statistics, frozen, KEY
    )
    losses.append(float(loss))
  return trainable, statistics, losses


def test_three_steps_lower_the_loss(trained):
  _, _, losses = trained
  assert losses == sorted(set(losses), reverse=True)


def test_every_convolution_is_in_4_bits_and_has_an_adapter(halves):
  frozen, trainable = halves
  kinds = jlora.labels(trainable)
  for path, leaf in tree.leaves_by_path(frozen, is_quantized).items():
    if path.endswith('kernel') and path != 'head/kernel':
      assert is_quantized(leaf), path
      assert tree.leaves_by_path(kinds).keys() >= {f'{path}/a', f'{path}/b'}
    else:
      assert f'{path}/full' in tree.leaves_by_path(kinds)


def test_loss_gradient_and_statistics_are_those_of_merge(trained, spec, halves):
  trainable, statistics, _ = trained
  apply = ResNet().apply
  lifted = jlora.lift(apply, on_missing='error')

  @jax.jit
  def both(*args):
    return (
      make_gradient(spec, jlora.combine, lifted)(*args),
      make_gradient(spec, jlora.merge, apply)(*args),
    )

  ours, theirs = both(trainable, halves[0], statistics, KEY)
  for mine, oracle in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    assert np.any(oracle)
    difference = np.linalg.norm(np.asarray(mine) - np.asarray(oracle))
    assert difference <= 1e-5 * np.linalg.norm(oracle)


def test_statistics_are_used_where_the_flag_says_so(trained, spec, halves):
  trainable, statistics, _ = trained
  apply = jax.jit(jlora.lift(ResNet().apply), static_argnums=2)
  params = jlora.combine(halves[0], trainable, spec)
  variables = {'params': params, 'batch_stats': statistics}
  together = apply(variables, IMAGES, False)
  alone = apply(variables, IMAGES[:1], False)
  np.testing.assert_allclose(together[:1], alone, atol=1e-5)
