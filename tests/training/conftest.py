"""A tiny run: a decoder, both halves of its parameters, and packed batches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.data.batch import Batch
from jlora.models import families
from jlora.models.decoder import Decoder
from jlora.parallel.mesh import make_mesh, replicated
from jlora.training.optimizers import OptimSpec, make_optimizer
from jlora.training.step import make_loss


@dataclasses.dataclass(frozen=True)
class Run:
  """What a training step is made of."""

  model: Decoder
  spec: jlora.LoraSpec
  frozen: Any
  trainable: Any
  tx: optax.GradientTransformation
  loss_fn: Any

  def state(self):
    """A fresh state on one device, whose buffers a step may take."""
    trainable = jax.tree.map(jnp.copy, self.trainable)
    opt_state = self.tx.init(trainable)
    state = jlora.TrainState(jnp.int32(0), trainable, opt_state)
    mesh = make_mesh(devices=jax.devices()[:1])
    return jax.device_put(state, replicated(mesh))

  def abstract_state(self):
    """The shapes of a state."""
    opt_state = jax.eval_shape(self.tx.init, self.trainable)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return jlora.TrainState(step, self.trainable, opt_state)


@pytest.fixture(scope='session')
def make_params():
  """Initializes a decoder, or gives the shapes of its parameters only."""

  @functools.cache
  def make(config, abstract=False):
    def init():
      tokens = jnp.zeros((1, 2), jnp.int32)
      return Decoder(config).init(jax.random.key(0), tokens)['params']

    return jax.eval_shape(init) if abstract else jax.jit(init)()

  return make


@pytest.fixture(scope='session')
def make_run(make_params, sizes):
  """Builds a Run; keywords of `LoraSpec` come last."""

  @functools.cache
  def make(
    config=None,
    *,
    remat='full',
    quant=True,
    unroll=1,
    chunk=16,
    abstract=False,
    optim=None,
    **fields,
  ):
    config = config or sizes['tiny']
    spec = jlora.LoraSpec(**({'rank': 4} | fields))
    spec = families.resolve(spec, config)
    four_bit = families.resolve(jlora.QuantSpec(), config) if quant else None
    model = Decoder(config, remat=remat, unroll=unroll)
    split = functools.partial(jlora.partition, spec=spec, quant=four_bit)
    split = split if abstract else jax.jit(split)
    frozen, trainable = split(jax.random.key(1), make_params(config, abstract))
    optim = optim or OptimSpec(learning_rate=1e-2, schedule='constant')
    return Run(
      model=model,
      spec=spec,
      frozen=frozen,
      trainable=trainable,
      tx=make_optimizer(optim, 20, trainable),
      loss_fn=make_loss(
        model, spec, chunk=chunk, frozen_head=not spec.train_full
      ),
    )

  return make


@pytest.fixture(scope='session')
def make_batch():
  """Draws a batch; the rows train very different numbers of tokens."""

  def make(rows=8, length=16, seed=0, abstract=False):
    if abstract:
      return jax.eval_shape(lambda: make(rows, length))
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 160, (rows, length + 1))
    lengths = 1 + np.arange(rows) * (length - 1) // max(rows - 1, 1)
    mask = np.arange(length)[None] < lengths[:, None]
    half = length // 2
    positions = np.concatenate([np.arange(half), np.arange(length - half)])
    return Batch(
      tokens=jnp.asarray(tokens[:, :-1], jnp.int32),
      targets=jnp.asarray(tokens[:, 1:], jnp.int32),
      loss_mask=jnp.asarray(mask, jnp.float32),
      segment_ids=jnp.asarray(
        np.tile(1 + (np.arange(length) >= half), (rows, 1)), jnp.int32
      ),
      positions=jnp.asarray(np.tile(positions, (rows, 1)), jnp.int32),
    )

  return make
