import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

import jlora
from jlora.parallel.mesh import make_mesh
from jlora.training.step import make_evaluation, make_step


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def lower_step(run, batch):
  step = make_step(run.loss_fn, run.tx, one_device())
  return step.lower(run.abstract_state(), run.frozen, batch)


def compile_step(run, batch):
  return lower_step(run, batch).compile()


def temp_of(compiled):
  return compiled.memory_analysis().temp_size_in_bytes


def plain_loss(run, batch):
  """Mean loss over trained tokens, through merge and all logits at once."""
  params = jlora.merge(run.frozen, run.trainable, run.spec)
  logits = run.model.apply(
    {'params': params}, batch.tokens, batch.positions, batch.segment_ids
  )
  log_probs = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
  return -jnp.sum(batch.loss_mask * chosen) / jnp.sum(batch.loss_mask)


@pytest.fixture(scope='module')
def run(make_run):
  return make_run()


@pytest.fixture(scope='module')
def step(run):
  """One step for the whole module: whatever is done, it is traced once."""
  loss_fn = chex.assert_max_traces(run.loss_fn, n=1)
  return make_step(loss_fn, run.tx, one_device())


def test_the_loss_is_the_mean_over_trained_tokens(run, step, make_batch):
  batch = make_batch()
  state, metrics = step(run.state(), run.frozen, batch)
  expected = jax.jit(functools.partial(plain_loss, run))(batch)
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  assert float(metrics['tokens']) == float(batch.loss_mask.sum())
  assert int(state.step) == 1


def test_the_evaluation_is_the_loss_in_summed_form(run, step, make_batch):
  batch = make_batch()
  evaluate = make_evaluation(run.loss_fn, one_device())
  total, tokens = evaluate(run.trainable, run.frozen, batch)
  _, metrics = step(run.state(), run.frozen, batch)
  np.testing.assert_allclose(total / tokens, metrics['loss'], rtol=1e-6)


def descent(step, run, batch, count=5):
  state, losses = run.state(), []
  for _ in range(count):
    state, metrics = step(state, run.frozen, batch)
    losses.append(float(metrics['loss']))
  return losses


def test_adapters_descend(run, step, make_batch):
  losses = descent(step, run, make_batch())
  assert losses == sorted(losses, reverse=True)


def test_a_head_that_is_trained_whole_descends(make_run, make_batch):
  run = make_run(train_full='embed/embedding')
  step = make_step(run.loss_fn, run.tx, one_device())
  losses = descent(step, run, make_batch())
  assert losses == sorted(losses, reverse=True)


def test_microbatches_of_unequal_tokens_equal_one_batch(run, step, make_batch):
  batch = make_batch(rows=8)
  counts = batch.loss_mask.sum(axis=1)
  assert counts.min() * 8 < counts.max()  # a mean of means would be far off
  cut = make_step(run.loss_fn, run.tx, one_device(), accumulate=8)
  results = []
  for one in (step, cut):
    state, metrics = one(run.state(), run.frozen, batch)
    del metrics['finite']
    # Adam's moments, not its update: that is little but a gradient's sign.
    results.append((metrics, jax.tree.leaves(state.opt_state)))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=1e-5, atol=1e-5 * float(abs(np.asarray(y)).max())
    ),
    *results,
  )


def test_a_step_takes_the_buffers_of_its_state_alone(run, step, make_batch):
  first = run.state()
  step(first, run.frozen, make_batch())
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.trainable))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.frozen))


def constants(jaxpr):
  """Yields the arrays that a program holds, inner programs included."""
  if isinstance(jaxpr, jex.ClosedJaxpr):
    yield from jaxpr.consts
    jaxpr = jaxpr.jaxpr
  for equation in jaxpr.eqns:
    yield from (v.val for v in equation.invars if isinstance(v, jex.Literal))
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda v: isinstance(v, jex.ClosedJaxpr | jex.Jaxpr),
    ):
      if isinstance(inner, jex.ClosedJaxpr | jex.Jaxpr):
        yield from constants(inner)


def test_the_step_holds_no_large_constant(make_run, make_batch, sizes):
  wide = dataclasses.replace(sizes['tiny'], vocab_size=8192)
  run, batch = make_run(wide), make_batch()
  step = make_step(run.loss_fn, run.tx, one_device())

  def largest(fn, *args):
    held = constants(jax.make_jaxpr(fn)(*args))
    return max((getattr(x, 'nbytes', 0) for x in held), default=0)

  state = run.state()
  assert largest(step, state, run.frozen, batch) <= 1 << 20
  closed = largest(lambda s: step(s, run.frozen, batch), state)
  assert closed > 1 << 20  # the check can see


def test_a_gradient_that_is_not_finite_changes_the_step_only(
  run, step, make_batch
):
  batch = make_batch()
  broken = dataclasses.replace(
    batch, loss_mask=batch.loss_mask.at[0].set(jnp.inf)
  )
  state, good = step(run.state(), run.frozen, batch)
  before = jax.tree.map(np.array, (state.trainable, state.opt_state))
  state, bad = step(state, run.frozen, broken)
  assert (bool(good['finite']), bool(bad['finite'])) == (True, False)
  after = (state.trainable, state.opt_state)
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert int(state.step) == 2


def test_a_batch_without_trained_tokens_has_no_gradient(run, step, make_batch):
  batch = make_batch()
  empty = dataclasses.replace(batch, loss_mask=0 * batch.loss_mask)
  _, metrics = step(run.state(), run.frozen, empty)
  assert float(metrics['loss']) == float(metrics['grad_norm']) == 0
  assert bool(metrics['finite'])


def test_dropout_is_drawn_anew_each_step_and_again_by_repetition(
  make_run, make_batch
):
  run, batch = make_run(dropout=0.5), make_batch()
  acting = jax.tree.map(lambda x: x + 0.1, run.trainable)
  run = dataclasses.replace(run, trainable=acting)
  step = make_step(run.loss_fn, run.tx, one_device())

  def loss(count):
    state = dataclasses.replace(run.state(), step=jnp.int32(count))
    return float(step(state, run.frozen, batch)[1]['loss'])

  assert loss(0) == loss(0) != loss(1)


def growth(make_run, config, batch, rank):
  """Bytes that 15 more layers add to the gradient and to the whole step."""
  gradients, steps = [], []
  for layers in (30, 15):
    run = make_run(
      dataclasses.replace(config, layers=layers), abstract=True, rank=rank
    )
    loss = jax.jit(jax.grad(run.loss_fn, has_aux=True))
    lowered = loss.lower(run.trainable, run.frozen, batch, None)
    gradients.append(temp_of(lowered.compile()))
    steps.append(temp_of(compile_step(run, batch)))
  adapters = 4 * sum(x.size for x in jax.tree.leaves(run.trainable))
  return gradients[0] - gradients[1], steps[0] - steps[1], adapters


@pytest.mark.parametrize(
  ('size', 'rows', 'length', 'rank'),
  [
    ('tiny', 4, 128, 4),
    pytest.param('smollm2', 4, 256, 16, marks=pytest.mark.slow),
  ],
)
def test_a_layer_more_adds_its_input_and_its_gradients_to_scratch(
  make_run, make_batch, sizes, size, rows, length, rank
):
  config = sizes[size]
  batch = make_batch(rows, length, abstract=True)
  gradient, step, adapters = growth(make_run, config, batch, rank)
  saved = 15 * 4 * rows * length * config.embed_dim
  assert saved <= gradient <= 1.1 * saved
  assert saved <= step - adapters <= 1.1 * saved


def test_more_layers_are_no_more_to_compile(make_run, make_batch, sizes):
  batch = make_batch(2, 16, abstract=True)

  def lines(layers):
    config = dataclasses.replace(sizes['tiny'], layers=layers)
    lowered = lower_step(make_run(config, abstract=True), batch)
    return lowered.as_text().count('\n')

  assert lines(6) == lines(3)


def test_scratch_of_a_real_step_stays_below_0_35_gib(
  make_run, make_batch, sizes
):
  run = make_run(sizes['smollm2'], abstract=True, rank=16, chunk=256)
  batch = make_batch(4, 256, abstract=True)
  assert temp_of(compile_step(run, batch)) <= 0.35 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize(('remat', 'bound'), [('none', 0.74), ('full', 0.80)])
def test_flops_of_lora_over_full_fine_tuning(
  make_run, make_batch, sizes, remat, bound
):
  full = {'targets': (), 'train_full': '.*'}
  batch = make_batch(4, 256, abstract=True)
  flops = []
  for fields in ({'rank': 16}, full):
    run = make_run(
      sizes['smollm2'],
      remat=remat,
      quant=False,
      unroll=30,
      abstract=True,
      chunk=1024,
      **fields,
    )
    flops.append(compile_step(run, batch).cost_analysis()['flops'])
  assert 0.62 <= flops[0] / flops[1] <= bound
