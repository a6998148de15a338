"""Every rule against `merge`, in value and gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora

# Name -> shape and roles of a kernel.
KERNELS = {
  'flat': ((8, 8), 'in -> out'),
  'wide': ((8, 12), 'in -> out'),
  'column': ((8, 1), 'in -> out'),
  'layers': ((3, 8, 8), 'layers | in -> out'),
  'single': ((1, 8, 8), 'layers | in -> out'),
  'nested': ((2, 3, 8, 8), 'groups layers | in -> out'),
  'six': ((6, 8, 8), 'layers | in -> out'),
  'middle': ((8, 3, 8), 'in layers out: layers | in -> out'),
  'heads': ((8, 2, 4), 'in -> heads head_dim'),
  'merged': ((2, 4, 6), 'heads head_dim -> out'),
  'torch': ((12, 8), 'out in: in -> out'),
  'kv': ((2, 3, 8, 4), 's k d h: d -> s k h'),
  'table': ((10, 8), 'vocab -> embed'),
  'window': ((3, 3, 4, 6), 'h w in -> out'),
  'grouped': ((3, 3, 2, 6), 'h w in -> out'),
  'deep': ((3, 3, 1, 4), 'h w in -> out'),
  'pytorch': ((6, 4, 3, 3), 'out in h w: in h w -> out'),
  'experts': ((3, 8, 12), 'experts | in -> out'),
}
KINDS = ('lora', 'codes', 'dora nf4')


@dataclasses.dataclass(frozen=True)
class Case:
  """One kernel, frozen and trainable halves, with an adapter that acts."""

  frozen: dict
  trainable: dict
  spec: jlora.LoraSpec | None

  def lazy(self, trainable):
    if self.spec is None:
      return self.frozen
    return jlora.combine(self.frozen, trainable, self.spec)

  def dense(self, trainable):
    if self.spec is None:
      return jlora.dequantize(self.frozen)
    return jlora.merge(self.frozen, trainable, self.spec)


@functools.cache
def make_case(name, kind='lora'):
  shape, roles = KERNELS[name]
  random = np.random.default_rng(0)
  params = {'w': jnp.asarray(random.standard_normal(shape) / 3, jnp.float32)}
  fields = {'targets': '.*', 'axes': {'.*': roles}}
  quant = jlora.QuantSpec(block_size=4, **fields)
  if kind == 'codes':
    return Case(jlora.quantize(params, quant), {}, None)
  rank = 1 if name == 'column' else 2
  variant = 'dora' if 'dora' in kind else 'lora'
  spec = jlora.LoraSpec(rank=rank, alpha=3.0, variant=variant, **fields)
  frozen, trainable = jlora.partition(
    jax.random.key(0), params, spec, quant=quant if 'nf4' in kind else None
  )
  noise = {
    part: jnp.asarray(random.standard_normal(x.shape) / 3, jnp.float32)
    for part, x in trainable['w'].items()
  }
  trainable = jax.tree.map(jnp.add, trainable, {'w': noise})
  return Case(frozen, trainable, spec)


def normal(shape):
  return jax.random.normal(jax.random.key(7), shape)


def check(kernel, fn, *args, kinds=KINDS):
  """Checks that `fn(kernel, *args)` equals merge in value and gradient.

  All kinds of leaf are compiled as one program, which takes the least time.
  """
  cases = [make_case(kernel, kind) for kind in kinds]
  floats = [x for x in args if jnp.issubdtype(x.dtype, jnp.floating)]

  def loss(fn, attribute, trainables, floats):
    total, results = 0.0, []
    for case, trainable in zip(cases, trainables, strict=True):
      params = getattr(case, attribute)(trainable)
      y = fn(params['w'], *floats, *args[len(floats) :])
      total += sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(y))
      results.append(y)
    return total, results

  trainables = [case.trainable for case in cases]
  lifted = jlora.lift(fn, on_missing='error')
  results = []
  for function, attribute in ((lifted, 'lazy'), (fn, 'dense')):
    run = functools.partial(loss, function, attribute)
    run = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    results.append(jax.jit(run)(trainables, floats))
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-5)
  jax.tree.map(near, *results)


def scan(body, init, xs, **options):
  def step(h, w):
    return jnp.sin(body(h, w)), None

  return lax.scan(step, init, xs, **options)[0]


# Name of the case -> kernel, function of kernel and input, input's shape.
PRODUCTS = {
  'matmul': ('wide', lambda w, x: x @ w, (5, 8)),
  'kernel first': ('wide', lambda w, x: jnp.einsum('io,bi->ob', w, x), (5, 8)),
  'input transposed': ('wide', lambda w, x: x.T @ w, (8, 5)),
  'vector': ('wide', lambda w, x: x @ w, (8,)),
  'one output': ('column', lambda w, x: x @ w, (5, 8)),
  'many axes out': (
    'heads',
    lambda w, x: jnp.einsum('bsi,ihd->bhsd', x, w),
    (2, 5, 8),
  ),
  'many axes in': (
    'merged',
    lambda w, x: jnp.einsum('bdsh,hdo->bso', x, w),
    (2, 4, 5, 2),
  ),
  'tied head': ('table', lambda w, x: x @ w.T, (5, 8)),
  'transposed heads': (
    'heads',
    lambda w, x: jnp.einsum('bhd,ihd->bi', x, w),
    (5, 2, 4),
  ),
  'torch layout': ('torch', lambda w, x: x @ w.T, (5, 8)),
  'torch, kernel first': ('torch', lambda w, x: w @ x, (8, 5)),
  'gemma kv': (
    'kv',
    lambda w, x: jnp.einsum('bsd,ckdh->cbskh', x, w),
    (2, 5, 8),
  ),
  'layers in parallel': (
    'layers',
    lambda w, x: jnp.einsum('lbi,lio->lbo', x, w),
    (3, 5, 8),
  ),
  'layers, batch axis last': (
    'layers',
    lambda w, x: jnp.einsum('bil,lio->blo', x, w),
    (5, 8, 3),
  ),
  'one input, all layers': (
    'layers',
    lambda w, x: jnp.einsum('bi,lio->blo', x, w),
    (5, 8),
  ),
  'stacked in the middle': (
    'middle',
    lambda w, x: jnp.einsum('lbi,ilo->lbo', x, w),
    (3, 5, 8),
  ),
  'vmap over layers': (
    'layers',
    lambda w, x: jax.vmap(jnp.dot)(x, w),
    (3, 5, 8),
  ),
  'broadcast': (
    'flat',
    lambda w, x: jnp.matmul(x, jnp.broadcast_to(w, (3, 8, 8))),
    (3, 5, 8),
  ),
  'reshaped': ('heads', lambda w, x: x @ w.reshape(8, 8), (5, 8)),
  'split by reshape': (
    'wide',
    lambda w, x: jnp.einsum('bi,ihd->bhd', x, w.reshape(8, 3, 4)),
    (5, 8),
  ),
  'transposing reshape': (
    'layers',
    lambda w, x: x @ lax.reshape(w, (8, 24), dimensions=(1, 0, 2)),
    (5, 8),
  ),
  'one layer': ('layers', lambda w, x: x @ w[1], (5, 8)),
  'one layer of one': ('single', lambda w, x: x @ w[0], (5, 8)),
  'some layers': (
    'layers',
    lambda w, x: jnp.einsum('lbi,lio->lbo', x, w[::2]),
    (2, 5, 8),
  ),
  'fused projections, split': (
    'wide',
    lambda w, x: [x @ part for part in jnp.split(w, 3, axis=1)],
    (5, 8),
  ),
  'slice of a head dimension': (
    'heads',
    lambda w, x: jnp.einsum('bi,ihd->bhd', x, w[:, :, 1:3]),
    (5, 8),
  ),
  'reversed step of outputs': ('wide', lambda w, x: x @ w[:, 1::3], (5, 8)),
  'used twice': ('flat', lambda w, x: jnp.tanh(x @ w) @ w.T @ w, (5, 8)),
  'scan': ('layers', lambda w, x: scan(jnp.dot, x, w), (5, 8)),
  'scan in reverse': (
    'layers',
    lambda w, x: scan(jnp.dot, x, w, reverse=True, unroll=2),
    (5, 8),
  ),
  'scan over one layer': ('single', lambda w, x: scan(jnp.dot, x, w), (5, 8)),
  'scan, stacked in the middle': (
    'middle',
    lambda w, x: scan(jnp.dot, x, w.swapaxes(0, 1)),
    (5, 8),
  ),
  'scan in a scan': (
    'nested',
    lambda w, x: scan(lambda h, group: scan(jnp.dot, h, group), x, w),
    (5, 8),
  ),
  'scan over groups of layers': (
    'six',
    lambda w, x: scan(
      lambda h, group: scan(jnp.dot, h, group), x, w.reshape(2, 3, 8, 8)
    ),
    (5, 8),
  ),
  'scan with a constant': (
    'flat',
    lambda w, x: lax.scan(lambda h, _: (jnp.sin(h @ w), None), x, length=3)[0],
    (5, 8),
  ),
  'loop over layers by index': (
    'layers',
    lambda w, x: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ w[i]), x),
    (5, 8),
  ),
  'remat': (
    'layers',
    lambda w, x: scan(jax.checkpoint(jnp.dot), x, w),
    (5, 8),
  ),
  'custom_jvp around': (
    'flat',
    lambda w, x: jax.nn.silu(jax.nn.relu(x @ w)),
    (5, 8),
  ),
  'convolution': ('window', lambda w, x: convolve(w, x), (2, 5, 5, 4)),
  'strided convolution': (
    'window',
    lambda w, x: convolve(w, x, strides=(2, 2)),
    (2, 5, 5, 4),
  ),
  'grouped convolution': (
    'grouped',
    lambda w, x: convolve(w, x, groups=2),
    (2, 5, 5, 4),
  ),
  'depthwise convolution': (
    'deep',
    lambda w, x: convolve(w, x, groups=4),
    (2, 5, 5, 4),
  ),
  'convolution in the layout of torch': (
    'pytorch',
    lambda w, x: convolve(w, x, layout=('NCHW', 'OIHW', 'NCHW')),
    (2, 4, 5, 5),
  ),
  'experts': ('experts', lambda w, x: ragged(x, w), (7, 8)),
  'experts, transposed': (
    'experts',
    lambda w, x: ragged(x, w.swapaxes(1, 2)),
    (7, 12),
  ),
}


def convolve(w, x, strides=(1, 1), groups=1, layout=('NHWC', 'HWIO', 'NHWC')):
  return lax.conv_general_dilated(
    x,
    w,
    strides,
    'SAME',
    dimension_numbers=layout,
    feature_group_count=groups,
  )


def ragged(x, w):
  return lax.ragged_dot(x, w, jnp.array([2, 0, 4]))  # the last row has none


@pytest.mark.parametrize('name', PRODUCTS)
def test_a_product_needs_no_kernel(name):
  kernel, fn, shape = PRODUCTS[name]
  check(kernel, fn, normal(shape))


def test_whole_blocks_of_the_inputs_are_cut():
  # With DoRA a column has its length as a whole, so its parts are reported.
  kinds = ('lora', 'codes', 'nf4')
  check('flat', lambda w, x: x @ w[4:], normal((5, 4)), kinds=kinds)


IDS = jnp.array([[1, 9, 0], [4, 4, 3]])
LOOKUPS = {
  'take': lambda w, ids: jnp.take(w, ids, axis=0),
  'out of bounds': lambda w, ids: jnp.nan_to_num(jnp.take(w, ids + 5, axis=0)),
  'clipped': lambda w, ids: jnp.take(w, ids + 5, axis=0, mode='clip'),
  'index': lambda w, ids: w[ids],
  'negative index': lambda w, ids: w[-ids],
  'then the tied head': lambda w, ids: w[ids] @ w.T,
  'vmap of one row': lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids),
}


@pytest.mark.parametrize('name', LOOKUPS)
def test_a_lookup_decodes_only_its_rows(name):
  check('table', LOOKUPS[name], IDS)


def test_layers_are_taken_by_index():
  def fn(w, x, ids):
    return jnp.einsum('tbi,tio->tbo', x, w[ids])

  ids = jnp.array([2, 0, 0, 1])
  check('layers', fn, normal((4, 5, 8)), ids)


@pytest.mark.parametrize('index', range(3))
def test_a_branch_gets_the_kernel(index):
  def fn(w, x, index):
    branches = (lambda w: x @ w, lambda w: x @ w.T, lambda w: x)
    return lax.switch(index, branches, w)

  check('flat', fn, normal((5, 8)), jnp.int32(index))


@pytest.mark.parametrize('kind', ['lora', 'nf4', 'codes'])
def test_a_while_loop_carries_a_kernel_along(kind):
  case = make_case('flat', kind)

  def fn(w, x):
    def turn(carry):
      w, h, i = carry
      return w, jnp.tanh(h @ w), i + 1

    return lax.while_loop(lambda c: c[2] < 3, turn, (w, x, 0))[1]

  x = normal((5, 8))
  ours = jlora.lift(fn, on_missing='error')(case.lazy(case.trainable)['w'], x)
  theirs = fn(case.dense(case.trainable)['w'], x)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_a_scan_hands_on_stays_lazy():
  def fn(w, x):
    def body(carry, layer):
      same, h = carry
      return (same, jnp.sin(h @ layer @ same)), layer

    (same, h), layers = lax.scan(body, (w[0], x), w)
    return h @ same + x @ layers[1]

  check('layers', fn, normal((5, 8)))


MISSING = {
  'sin': ('flat', lambda w, x: x @ jnp.sin(w)),
  'dot_general': ('merged', lambda w, x: jnp.einsum('bh,hdo->bdo', x, w)),
  'scan over an axis that is not stacked': (
    'flat',
    lambda w, x: lax.scan(lambda c, row: (c + row, None), x[0], w)[0],
  ),
  'custom_jvp_call': ('flat', lambda w, x: jax.nn.relu(w)),
  'slice': ('flat', lambda w, x: x @ w[1:3]),
  'being returned': ('flat', lambda w, x: w),
  'convert_element_type': ('flat', lambda w, x: w.astype(int)),
}


@pytest.mark.parametrize('name', MISSING)
def test_what_has_no_rule_is_formed_and_reported_with_its_line(name):
  kernel, fn = MISSING[name]
  case = make_case(kernel, 'nf4')
  x = normal((5, 2))
  if name in ('sin', 'scan over an axis that is not stacked'):
    x = normal((5, 8))
  with pytest.warns(UserWarning, match=f"'{name}'.* has no rule .*'0'") as said:
    ours = jlora.lift(fn)(case.lazy(case.trainable)['w'], x)
  theirs = fn(case.dense(case.trainable)['w'], x)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  if name != 'being returned':
    assert 'rules_test.py' in str(said[0].message)


def test_a_product_keeps_the_dtype_that_it_asks_for():
  def fn(w, x):
    return jnp.dot(x, w, preferred_element_type=jnp.bfloat16)

  case = make_case('flat')
  lazy = case.lazy(case.trainable)['w']
  assert jlora.lift(fn)(lazy, normal((5, 8))).dtype == jnp.bfloat16


def test_a_cast_stays_lazy_and_is_what_the_kernel_is_decoded_to():
  def fn(w, x):
    return x @ w.astype(jnp.bfloat16)

  case = make_case('flat', 'nf4')
  x = normal((5, 8)).astype(jnp.bfloat16)
  lazy, dense = case.lazy(case.trainable)['w'], case.dense(case.trainable)['w']
  result = jlora.lift(fn, on_missing='error')(lazy, x)
  assert result.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    result.astype(jnp.float32), fn(dense, x).astype(jnp.float32), atol=0.1
  )


def test_rematerialized_code_stays_so_with_its_policy():
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  block = jax.checkpoint(jnp.dot, policy=policy, prevent_cse=False)
  case = make_case('flat')
  jaxpr = jax.make_jaxpr(jlora.lift(lambda w, x: block(x, w)))(
    case.lazy(case.trainable)['w'], normal((5, 8))
  )
  (equation,) = [
    e for e in jaxpr.eqns if e.primitive.name in ('checkpoint', 'remat2')
  ]
  assert equation.params['policy'] is policy
  assert equation.params['prevent_cse'] is False
