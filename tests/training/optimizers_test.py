import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jlora
from jlora.errors import ConfigError
from jlora.training.optimizers import (
  OptimSpec,
  decay_mask,
  make_optimizer,
  make_schedule,
)

TRAINABLE = {
  'up': {'kernel': {'a': jnp.ones((6, 2)), 'b': jnp.full((2, 3), 0.5)}},
  'up_bias': {'bias': {'full': jnp.ones(3)}},
  'norm': {'scale': {'full': jnp.ones(6)}},
  'embed': {'embedding': {'full': jnp.ones((7, 6))}},
  'dora': {'kernel': {'magnitude': jnp.ones(3)}},
}


def like(tree, seed):
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), tree
  )


def is_shape(x):
  return isinstance(x, tuple)


def values(spec, steps, count=None):
  schedule = make_schedule(spec, steps)
  return np.array([float(schedule(i)) for i in range(count or steps)])


def test_a_constant_schedule_is_the_learning_rate():
  spec = OptimSpec(learning_rate=0.5, schedule='constant')
  np.testing.assert_array_equal(values(spec, 4), [0.5] * 4)


def test_warmup_rises_in_equal_steps_and_never_trains_at_zero():
  spec = OptimSpec(learning_rate=1.0, schedule='constant', warmup=3)
  np.testing.assert_allclose(values(spec, 6), [0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine_falls_from_the_peak_to_zero():
  spec = OptimSpec(learning_rate=2.0, schedule='cosine', warmup=2)
  turns = np.arange(9) / 8
  expected = [2 / 3, 4 / 3, *(1 + np.cos(np.pi * turns))]
  np.testing.assert_allclose(values(spec, 10, 11), expected, atol=1e-6)


@pytest.mark.parametrize('schedule', ['constant', 'cosine'])
def test_a_warmup_longer_than_the_run_reaches_the_peak(schedule):
  spec = OptimSpec(learning_rate=1.0, schedule=schedule, warmup=50)
  np.testing.assert_allclose(values(spec, 4), [0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('learning_rate', 0.0),
    ('learning_rate', -1e-3),
    ('learning_rate', float('nan')),
    ('learning_rate', float('inf')),
    ('schedule', 'linear'),
    ('warmup', -1),
    ('weight_decay', -0.1),
    ('weight_decay', float('nan')),
    ('weight_decay', float('inf')),
    ('clip', -1.0),
    ('clip', float('nan')),
    ('b1', 1.0),
    ('b2', -0.1),
    ('eps', 0.0),
  ],
)
def test_a_spec_refuses_what_cannot_be(field, value):
  with pytest.raises(ConfigError, match=rf'optim\.{field}.*{value}'):
    OptimSpec(**{field: value})


def test_weight_decay_spares_norms_biases_and_magnitudes():
  assert decay_mask(TRAINABLE) == {
    'up': {'kernel': {'a': True, 'b': True}},
    'up_bias': {'bias': {'full': False}},
    'norm': {'scale': {'full': False}},
    'embed': {'embedding': {'full': True}},
    'dora': {'kernel': {'magnitude': False}},
  }


def test_weight_decay_alone_shrinks_what_it_may():
  spec = OptimSpec(learning_rate=0.5, schedule='constant', weight_decay=0.1)
  tx = make_optimizer(spec, 5, TRAINABLE)
  zeros = jax.tree.map(jnp.zeros_like, TRAINABLE)
  updates, _ = jax.jit(tx.update)(zeros, tx.init(TRAINABLE), TRAINABLE)
  np.testing.assert_allclose(updates['up']['kernel']['b'], -0.025, rtol=1e-6)
  assert not np.any(updates['norm']['scale']['full'])


def test_the_updates_are_those_of_adamw():
  spec = OptimSpec(
    learning_rate=0.1, warmup=2, weight_decay=0.1, clip=1.0, b1=0.8, b2=0.95
  )
  schedule = make_schedule(spec, 6)
  oracle = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      schedule, 0.8, 0.95, weight_decay=0.1, mask=decay_mask(TRAINABLE)
    ),
  )
  results = []
  for tx in (make_optimizer(spec, 6, TRAINABLE), oracle):
    params, state = TRAINABLE, tx.init(TRAINABLE)
    update = jax.jit(tx.update)
    for seed in range(4):
      updates, state = update(like(params, seed), state, params)
      params = optax.apply_updates(params, updates)
    results.append(params)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *results
  )


def first_moments(tx, grads):
  """Adam's first moment after one update, which is (1 - b1) * gradient."""
  _, state = jax.jit(tx.update)(grads, tx.init(TRAINABLE), TRAINABLE)
  names = jax.tree_util.tree_leaves_with_path(state)
  return [leaf for path, leaf in names if '.mu' in jax.tree_util.keystr(path)]


@pytest.mark.parametrize(('clip', 'norm'), [(2.0, 2.0), (0.0, 50.0)])
def test_clipping_bounds_the_norm_of_the_trainable_tree(clip, norm):
  spec = dataclasses.replace(OptimSpec(), clip=clip)
  grads = like(TRAINABLE, 0)
  size = optax.tree.norm(grads)
  grads = jax.tree.map(lambda g: 50 / size * g, grads)
  moments = first_moments(make_optimizer(spec, 5, TRAINABLE), grads)
  np.testing.assert_allclose(optax.tree.norm(moments), 0.1 * norm, rtol=1e-5)


def test_the_state_holds_two_moments_of_what_is_trained(make_run):
  run = make_run(abstract=True)
  state = jax.eval_shape(run.tx.init, run.trainable)
  frozen = {leaf.shape for leaf in jax.tree.leaves(run.frozen)}
  kernels = {
    leaf.shape
    for leaf in jax.tree.leaves(
      run.frozen, is_leaf=lambda x: hasattr(x, 'ndim')
    )
  }
  trained = {leaf.shape for leaf in jax.tree.leaves(run.trainable)}
  held = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
  assert {leaf.shape for leaf in held} == trained
  assert trained.isdisjoint(frozen | kernels)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in held)
  assert size == 2 * 4 * sum(x.size for x in jax.tree.leaves(run.trainable))
  counters = [leaf for leaf in jax.tree.leaves(state) if not leaf.shape]
  assert {leaf.dtype for leaf in counters} == {jnp.dtype('int32')}


def test_moments_of_eight_bits_take_a_quarter():
  params = {'k': {'a': jnp.ones((512, 16)), 'b': jnp.ones((16, 512))}}

  def size(bits):
    tx = make_optimizer(OptimSpec(moment_bits=bits), 10, params)
    state = jax.eval_shape(tx.init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

  assert size(32) == pytest.approx(8 * 16384, rel=1e-3)
  assert size(8) == pytest.approx((2 + 8 / 256) * 16384, rel=1e-3)


def test_a_plain_flax_train_state_trains_the_trainable_half(
  make_run, make_batch
):
  run, batch = make_run(), make_batch()
  state = TrainState.create(
    apply_fn=jlora.lift(run.model.apply), params=run.trainable, tx=run.tx
  )

  @jax.jit
  def step(state, frozen, batch):
    def loss_fn(trainable):
      loss, tokens = run.loss_fn(trainable, frozen, batch, None)
      return loss / tokens

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss

  losses = []
  for _ in range(4):
    state, loss = step(state, run.frozen, batch)
    losses.append(float(loss))
  assert losses == sorted(losses, reverse=True)
  assert int(state.step) == 4


def test_lora_plus_trains_b_faster_and_nothing_else():
  params = {'k': {'a': jnp.ones((4, 2)), 'b': jnp.ones((2, 4))}}
  updates = []
  for ratio in (1.0, 16.0):
    spec = OptimSpec(lora_plus=ratio, clip=0.0)
    tx = make_optimizer(spec, 10, params)
    updates.append(tx.update(params, tx.init(params), params)[0]['k'])
  plain, faster = updates
  np.testing.assert_array_equal(faster['a'], plain['a'])
  np.testing.assert_array_equal(faster['b'], 16 * plain['b'])


@pytest.mark.parametrize('quant', [None, jlora.QuantSpec()])
def test_adam_does_not_see_how_a_scale_is_shared_between_a_and_b(quant):
  """With powers of two, the two runs agree bit for bit.

  s / (p q), p a and q b make the same update of a kernel, and Adam without eps
  moves a factor by its learning rate, whatever the scale of its gradient.
  """
  shapes = {'up': {'kernel': (64, 96)}, 'down': {'kernel': (96, 64)}}
  params = like(jax.tree.map(jnp.empty, shapes, is_leaf=is_shape), 0)
  x = like(jnp.empty((5, 64)), 1)
  key, p, q = jax.random.key(0), 4.0, 0.5

  def losses(alpha, start, rates):
    spec = jlora.LoraSpec(rank=4, alpha=alpha)
    frozen, trainable = jlora.partition(key, params, spec, quant=quant)
    groups = jlora.labels(trainable)
    trainable = jax.tree.map(lambda x, name: x * start[name], trainable, groups)
    adam = {name: optax.adam(rates[name], eps=1e-30) for name in rates}
    tx = optax.partition(adam, groups)

    @jlora.lift
    def loss(params):
      h = jnp.tanh(x @ params['up']['kernel'] / 8) @ params['down']['kernel']
      return jnp.mean(jnp.square(h - 1))

    def step(state, _):
      trainable, opt_state = state
      value, grads = jax.value_and_grad(
        lambda trainable: loss(jlora.combine(frozen, trainable, spec))
      )(trainable)
      updates, opt_state = tx.update(grads, opt_state)
      return (optax.apply_updates(trainable, updates), opt_state), value

    state = trainable, tx.init(trainable)
    return jax.lax.scan(step, state, length=5)[1].tolist()

  plain = losses(8.0, {'a': 1, 'b': 1}, {'a': 1e-2, 'b': 1e-2})
  shared = losses(8.0 / p / q, {'a': p, 'b': 1}, {'a': p / 100, 'b': q / 100})
  assert plain == shared
  assert plain == sorted(set(plain), reverse=True)
