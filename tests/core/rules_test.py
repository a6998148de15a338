import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

AXES = {
  'layers': 'layers | in -> out',
  'nested': 'groups layers | in -> out',
  'heads': 'in -> heads head_dim',
  'merged': 'heads head_dim -> out',
  'flat': 'in -> out',
}
SHAPES = {
  'layers': (3, 8, 8),
  'nested': (2, 3, 8, 8),
  'heads': (8, 2, 4),
  'merged': (2, 4, 6),
  'flat': (8, 8),
}


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'nf4'])
def kernels(request):
  """Two trees of the same kernels, lazy and dense, with adapters that act."""
  random = np.random.default_rng(0)
  params = {
    name: jnp.asarray(random.standard_normal(shape) / 3, jnp.float32)
    for name, shape in SHAPES.items()
  }
  spec = jlora.LoraSpec(rank=2, targets='.*', axes=AXES)
  quant = jlora.QuantSpec(block_size=4, targets='.*', axes=AXES)
  frozen, trainable = jlora.partition(
    jax.random.key(0), params, spec, quant=quant if request.param else None
  )
  for node in trainable.values():
    node['b'] = jnp.asarray(
      random.standard_normal(node['b'].shape) / 9, jnp.float32
    )
  lazy = jlora.combine(frozen, trainable, spec)
  return lazy, jlora.merge(frozen, trainable, spec)


def compare(kernels, fn, *args, on_missing='error'):
  """Checks that `fn(params, *args)` is the same on lazy and dense kernels."""
  lazy, dense = kernels
  ours = jlora.lift(fn, on_missing=on_missing)(lazy, *args)
  check = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
  jax.tree.map(check, ours, fn(dense, *args))


def normal(*shape):
  return jax.random.normal(jax.random.key(7), shape)


@pytest.mark.parametrize(
  ('equation', 'name', 'shape'),
  [
    ('bi,io->bo', 'flat', (5, 8)),
    ('io,bi->ob', 'flat', (5, 8)),
    ('ib,io->bo', 'flat', (8, 5)),
    ('bsi,ihd->bshd', 'heads', (2, 5, 8)),
    ('bsi,ihd->bhsd', 'heads', (2, 5, 8)),
    ('bshd,hdo->bso', 'merged', (2, 5, 2, 4)),
    ('bdsh,hdo->bso', 'merged', (2, 4, 5, 2)),
    ('i,io->o', 'flat', (8,)),
  ],
)
def test_contracting_all_inputs_needs_no_kernel(kernels, equation, name, shape):
  def fn(params, x):
    kernel_first = equation.startswith('io,')
    operands = (params[name], x) if kernel_first else (x, params[name])
    return jnp.einsum(equation, *operands)

  compare(kernels, fn, normal(*shape))


@pytest.mark.parametrize(
  ('equation', 'name', 'shape'),
  [
    ('bo,io->bi', 'flat', (5, 8)),  # the transposed kernel, as in a tied head
    ('bh,hdo->bdo', 'merged', (5, 2)),  # one of two input axes
    ('lbi,lio->lbo', 'layers', (3, 5, 8)),  # layers as a batch axis
  ],
)
def test_other_products_are_merged_and_reported(kernels, equation, name, shape):
  def fn(params, x):
    return jnp.einsum(equation, x, params[name])

  with pytest.warns(UserWarning, match=f"'dot_general' has no rule .*{name}"):
    compare(kernels, fn, normal(*shape), on_missing='warn')


def test_a_product_keeps_the_dtype_that_it_asks_for(kernels):
  def fn(params, x):
    return jnp.dot(x, params['flat'], preferred_element_type=jnp.bfloat16)

  assert jlora.lift(fn)(kernels[0], normal(5, 8)).dtype == jnp.bfloat16


def test_a_cast_stays_lazy_and_is_what_the_kernel_is_decoded_to(kernels):
  def fn(params, x):
    return x @ params['flat'].astype(jnp.bfloat16)

  x = normal(5, 8).astype(jnp.bfloat16)
  result = jlora.lift(fn, on_missing='error')(kernels[0], x)
  assert result.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    result.astype(jnp.float32),
    fn(kernels[1], x).astype(jnp.float32),
    atol=0.05,  # 8 terms below 3, each within 2**-8
  )


def test_a_cast_to_whole_numbers_is_reported(kernels):
  with pytest.warns(UserWarning, match="'convert_element_type' has no rule"):
    compare(kernels, lambda p: p['flat'].astype(int), on_missing='warn')


def test_an_inner_jit_is_inlined(kernels):
  inner = jax.jit(lambda x, w: jax.jit(jnp.dot)(x, w) + 1)
  compare(kernels, lambda p, x: inner(x, p['flat']), normal(5, 8))


def test_rematerialized_code_stays_so_with_its_policy(kernels):
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  block = jax.checkpoint(
    lambda x, w: jnp.sin(x @ w), policy=policy, prevent_cse=False
  )

  def fn(params, x):
    return block(x, params['flat'])

  compare(kernels, fn, normal(5, 8))
  jaxpr = jax.make_jaxpr(jlora.lift(fn))(kernels[0], normal(5, 8))
  (equation,) = [
    e for e in jaxpr.eqns if e.primitive.name in ('checkpoint', 'remat2')
  ]
  assert equation.params['policy'] is policy
  assert equation.params['prevent_cse'] is False


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('unroll', [1, 3])
def test_a_scan_slices_the_layers(kernels, reverse, unroll):
  def fn(params, x):
    def body(carry, kernel):
      h, count = carry
      return (jnp.sin(h @ kernel), count + 1), h.sum()

    return jax.lax.scan(
      body, (x, 0), params['layers'], reverse=reverse, unroll=unroll
    )

  compare(kernels, fn, normal(5, 8))


def test_a_scan_within_a_scan_slices_both_stacked_axes(kernels):
  def fn(params, x):
    def layer(h, kernel):
      return jnp.sin(h @ kernel), None

    def group(h, layers):
      return jax.lax.scan(layer, h, layers)

    return jax.lax.scan(group, x, params['nested'])[0]

  compare(kernels, fn, normal(5, 8))


def test_a_scan_reads_a_lazy_constant(kernels):
  def fn(params, x):
    def body(h, _):
      return jnp.sin(h @ params['flat']), None

    return jax.lax.scan(body, x, length=3)[0]

  compare(kernels, fn, normal(5, 8))


def test_gradients_flow_through_a_scan(kernels):
  lazy, dense = kernels

  def loss(params, x):
    def body(h, kernel):
      return jnp.sin(h @ kernel), None

    return jax.lax.scan(body, x, params['layers'])[0].sum()

  ours = jax.grad(jlora.lift(loss), 1)(lazy, normal(5, 8))
  theirs = jax.grad(loss, 1)(dense, normal(5, 8))
  np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_a_scan_over_an_axis_that_is_not_stacked_is_reported(kernels):
  def fn(params):
    return jax.lax.scan(lambda c, row: (c, row.sum()), 0, params['flat'])[1]

  with pytest.warns(UserWarning, match='an axis that is not stacked'):
    compare(kernels, fn, on_missing='warn')


def test_a_lazy_loop_carry_is_reported(kernels):
  def fn(params, x):
    def body(carry, row):
      kernel, other = carry
      return (other, kernel), row @ kernel

    return jax.lax.scan(body, (params['flat'], jnp.ones((8, 8))), x)[1]

  with pytest.warns(UserWarning, match='a loop carry'):
    compare(kernels, fn, normal(5, 8), on_missing='warn')


@pytest.mark.parametrize(
  'fn',
  [
    lambda p, x: jax.lax.cond(
      x[0, 0] > 0, lambda w: x @ w, lambda w: x - w[0, 0], p['flat']
    ),
    lambda p, x: jax.lax.while_loop(
      lambda h: abs(h).max() > 1e-2, lambda h: h @ p['flat'] / 9, x
    ),
    lambda p, x: p['flat'][jnp.array([1, 2])] + p['flat'].T[1, 0],
  ],
  ids=['cond', 'while', 'gather'],
)
def test_what_has_no_rule_still_gives_the_right_result(kernels, fn):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    compare(kernels, fn, normal(5, 8), on_missing='warn')
  assert caught
