"""What lifting costs, in numbers that are exact: products and scratch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from experiments.benchmarks import lift, parts

KEY = jax.random.key(0)
LAYERS, ROWS, WIDTH, RANK = 3, 96, 64, 4
AXES = (('.*', 'layers | in -> out'),)
SPEC = jlora.LoraSpec(rank=RANK, axes=AXES)
SIZES = parts.Sizes(
  layers=3, width=128, mlp=352, heads=4, vocab=320, batch=2, length=64
)

quantized = pytest.mark.parametrize(
  'quantized', [False, True], ids=['plain', 'nf4']
)
model = pytest.mark.parametrize('model', lift.MODELS)


def stack(fn, shapes, *, quantized, merged=False):
  """Returns the loss of scanned layers, and shapes of what it takes."""
  params = {
    name: {'kernel': jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32)}
    for name, shape in shapes.items()
  }
  quant = jlora.QuantSpec(axes=AXES) if quantized else None
  frozen, trainable = jlora.partition(KEY, params, SPEC, quant=quant)

  def apply(params, h):
    return jax.lax.scan(lambda h, p: (fn(p, h), None), h, params)[0]

  lifted = jlora.lift(apply, on_missing='error')

  def loss(trainable, frozen, h):
    if merged:
      return apply(jlora.merge(frozen, trainable, SPEC), h).sum()
    return lifted(jlora.combine(frozen, trainable, SPEC), h).sum()

  h = jax.ShapeDtypeStruct((2, ROWS // 2, WIDTH), jnp.float32)
  return loss, (trainable, frozen, h)


def mlp(params, h):
  return jnp.tanh(h @ params['up']['kernel']) @ params['down']['kernel']


@quantized
def test_a_stack_of_products_costs_two_thirds_of_merging(quantized):
  wide = 3 * WIDTH
  shapes = {'up': (WIDTH, wide), 'down': (wide, WIDTH)}

  def flops(*, merged):
    loss, args = stack(mlp, shapes, quantized=quantized, merged=merged)
    return lift.count_flops(jax.make_jaxpr(jax.grad(loss))(*args).jaxpr)

  # Two products forward, four backward, in each of two adapters of a layer.
  adapters = LAYERS * 2 * 6 * ROWS * RANK * (WIDTH + wide)
  assert flops(merged=False) <= 0.70 * flops(merged=True) + adapters


def projections(names):
  def layer(params, h):
    x = jnp.sin(h)
    y = sum(x @ params[name]['kernel'] for name in names)
    return h * y.mean(axis=-1, keepdims=True)

  return layer


@quantized
def test_kernels_with_the_same_input_keep_it_once(quantized):
  def kept(names):
    shapes = dict.fromkeys(names, (WIDTH, 40))
    loss, args = stack(projections(names), shapes, quantized=quantized)
    pull = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *args)
    sizes = [x.size for x in jax.tree.leaves(pull)]
    return sizes.count(LAYERS * ROWS * WIDTH)

  assert kept('qkv') == kept('q') > 0


@functools.cache
def make_step(model, way, quantized):
  return lift.make_step(
    lift.MODELS[model], way, quantized=quantized, sizes=SIZES, rank=RANK
  )


@functools.cache
def compiled(*case):
  return make_step(*case).compile()


@quantized
@model
def test_the_products_are_those_of_code_by_hand(model, quantized):
  merged, lifted, by_hand = (
    make_step(model, way, quantized).flops() for way in lift.WAYS
  )
  assert lifted == by_hand < merged


@quantized
@model
def test_the_scratch_is_that_of_code_by_hand(model, quantized):
  lifted = lift.temp_of(compiled(model, 'lifted', quantized))
  by_hand = lift.temp_of(compiled(model, 'by hand', quantized))
  assert lifted <= 1.05 * by_hand


@quantized
@model
def test_the_compiled_operations_are_those_of_code_by_hand(model, quantized):
  lifted, by_hand = (
    compiled(model, way, quantized).cost_analysis()['flops']
    for way in ('lifted', 'by hand')
  )
  assert lifted <= 1.01 * by_hand


def filled(shapes):
  """Returns random arrays of the shapes and dtypes of a tree."""
  random = np.random.default_rng(0)

  def fill(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.asarray(random.integers(0, 16, leaf.shape), leaf.dtype)
    return jnp.asarray(random.standard_normal(leaf.shape) / 9, leaf.dtype)

  return jax.tree.map(fill, shapes)


@quantized
@model
def test_code_by_hand_computes_the_same(model, quantized):
  args = filled(make_step(model, 'lifted', quantized).args)
  ours = compiled(model, 'lifted', quantized)(*args)
  theirs = compiled(model, 'by hand', quantized)(*args)
  for mine, oracle in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    difference = np.linalg.norm(mine - oracle)
    assert difference <= 1e-5 * np.linalg.norm(oracle) > 0
