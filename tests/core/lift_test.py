import dataclasses
import functools
import inspect

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend import core as jex

import jlora
from jlora.core.linear import Adapter
from jlora.core.quantized import QuantizedArray
from jlora.models.decoder import make_cache


def assert_near(ours, theirs, bound=1e-5):
  """Within `bound` of each leaf's norm; 1e-5 is 80 ulp of float32."""

  def check(mine, oracle):
    mine, oracle = np.asarray(mine), np.asarray(oracle)
    assert mine.shape == oracle.shape
    assert np.linalg.norm(mine - oracle) <= bound * np.linalg.norm(oracle)

  jax.tree.map(check, ours, theirs)


def lifted_loss(case, trainable, key=None, on_missing='error'):
  apply = jlora.lift(case.model.apply, on_missing=on_missing)
  params = jlora.combine(case.frozen, trainable, case.spec, key=key)
  logits = apply({'params': params}, case.tokens)
  return jnp.mean(jnp.sin(logits)), logits


def merged_loss(case, trainable):
  params = jlora.merge(case.frozen, trainable, case.spec)
  logits = case.model.apply({'params': params}, case.tokens)
  return jnp.mean(jnp.sin(logits)), logits


def value_and_grad(loss, case, *rest):
  run = jax.value_and_grad(functools.partial(loss, case), has_aux=True)
  return jax.jit(run)(case.trainable, *rest)


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'nf4'])
def oracle(request, make_case):
  """Whether the base is quantized; value and gradient through merge."""
  case = make_case(quant=request.param)
  return request.param, value_and_grad(merged_loss, case)


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_lift_equals_merge_in_value_and_gradient(make_case, oracle, remat):
  quant, expected = oracle
  ours = value_and_grad(lifted_loss, make_case(remat, quant))
  assert_near(ours, expected)


@pytest.mark.parametrize(
  'fields',
  [
    {'train_full': ('.*/scale', 'embed/embedding')},
    {'quant': False, 'targets': (), 'train_full': '.*'},
  ],
  ids=['beside adapters', 'alone'],
)
def test_leaves_trained_whole_have_the_gradient_of_merge(make_case, fields):
  case = make_case(**fields)
  ours = value_and_grad(lifted_loss, case)
  assert_near(ours, value_and_grad(merged_loss, case))


def test_a_new_adapter_learns_through_b_alone(make_case):
  case = make_case()
  _, trainable = jlora.partition(jax.random.key(0), case.frozen, case.spec)
  case = dataclasses.replace(case, trainable=trainable)
  _, grads = value_and_grad(lifted_loss, case)
  for name, grad in zip(
    jax.tree.leaves(jlora.labels(grads)), jax.tree.leaves(grads), strict=True
  ):
    assert np.any(grad) == (name == 'b')


def test_dropout_masks_survive_rematerialization(make_case):
  key = jax.random.key(8)
  results = [
    value_and_grad(lifted_loss, make_case(remat, dropout=0.5), key)
    for remat in ('none', 'full')
  ]
  assert_near(*results)


@pytest.mark.parametrize('quant', [False, True], ids=['plain', 'nf4'])
def test_a_new_adapter_is_the_base_bit_for_bit(make_case, quant):
  case = make_case(quant=quant)
  _, trainable = jlora.partition(jax.random.key(0), case.frozen, case.spec)
  run = jax.jit(jlora.lift(case.model.apply))
  lazy = jlora.combine(case.frozen, trainable, case.spec)
  np.testing.assert_array_equal(
    run({'params': lazy}, case.tokens),
    run({'params': case.frozen}, case.tokens),
  )


@pytest.mark.parametrize('quant', [False, True], ids=['plain', 'nf4'])
def test_dropout_equals_a_loop_over_layers_with_masks_by_hand(quant):
  keys = jax.random.split(jax.random.key(0), 4)
  params = {'kernel': jax.random.normal(keys[0], (3, 64, 64)) / 8}
  axes = {'.*': 'layers | in -> out'}
  spec = jlora.LoraSpec(rank=4, dropout=0.25, axes=axes)
  four_bit = jlora.QuantSpec(axes=axes) if quant else None
  frozen, trainable = jlora.partition(keys[1], params, spec, quant=four_bit)
  trainable['kernel']['b'] += 0.1
  x = jax.random.normal(keys[2], (5, 64))

  def scanned(params, x):
    return jax.lax.scan(lambda h, k: (h @ k, None), x, params['kernel'])[0]

  leaf = jlora.combine(frozen, trainable, spec, key=keys[3])['kernel']
  h, dense = x, jlora.dequantize(frozen)['kernel']
  for i in range(3):
    kept = jax.random.bernoulli(leaf.key[i], 0.75, h.shape)
    branch = jnp.where(kept, h / 0.75, 0)
    h = h @ dense[i] + spec.scale * branch @ leaf.a[i] @ leaf.b[i]
  assert_near(jlora.lift(scanned)({'kernel': leaf}, x), h)


def test_in_bfloat16_lift_and_merge_differ_by_their_roundings():
  keys = jax.random.split(jax.random.key(0), 3)
  params = {'kernel': jax.random.normal(keys[0], (64, 48), jnp.bfloat16)}
  spec = jlora.LoraSpec(rank=4, alpha=8.0)
  frozen, trainable = jlora.partition(keys[1], params, spec)
  trainable['kernel']['b'] += 0.1
  x = jax.random.normal(keys[2], (20, 64), jnp.bfloat16)

  def product(params, x):
    return x @ params['kernel']

  lifted = jlora.lift(product)(jlora.combine(frozen, trainable, spec), x)
  merged = product(jlora.merge(frozen, trainable, spec), x)
  wide = jax.tree.map(lambda v: np.asarray(v, np.float64), (x, params))
  x, kernel = wide[0], wide[1]['kernel']
  a, b = (np.asarray(trainable['kernel'][n], np.float64) for n in 'ab')
  base, branch = x @ kernel, 2 * (x @ a) @ b
  y = np.abs(base + branch)
  u = 2.0**-8  # unit roundoff of bfloat16
  lift_bound = u * (np.abs(base) + np.abs(branch) + y)
  lift_bound += 2 * u * 2 * (np.abs(x) @ np.abs(a)) @ np.abs(b)
  merge_bound = u * (np.abs(x) @ np.abs(kernel + 2 * a @ b) + y)
  difference = np.abs(
    np.asarray(lifted, np.float64) - np.asarray(merged, np.float64)
  )
  assert lifted.dtype == merged.dtype == jnp.bfloat16
  assert (difference <= (lift_bound + merge_bound) * (1 + 4 * u)).all()


def products(jaxpr):
  """Yields the result shapes of all dot_generals, inner programs included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield equation.outvars[0].aval.shape
    for value in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda v: isinstance(v, jex.ClosedJaxpr | jex.Jaxpr),
    ):
      if isinstance(value, jex.ClosedJaxpr):
        yield from products(value.jaxpr)
      elif isinstance(value, jex.Jaxpr):
        yield from products(value)


def kernel_gradients(loss, case):
  """Returns the products in the gradient that look like a kernel's."""
  run = jax.grad(lambda t: loss(case, t)[0])
  jaxpr = jax.make_jaxpr(run)(case.trainable).jaxpr
  kernels = {
    leaf.shape[-2:]
    for leaf in jax.tree.leaves(
      case.frozen['layers'], is_leaf=lambda x: hasattr(x, 'inputs')
    )
    if leaf.ndim == 3
  }
  either = kernels | {shape[::-1] for shape in kernels}
  return [shape for shape in products(jaxpr) if shape in either]


@pytest.mark.parametrize('remat', ['none', 'full'])
@pytest.mark.parametrize('quant', [False, True], ids=['plain', 'nf4'])
def test_no_frozen_kernel_has_a_gradient(make_case, quant, remat):
  case = make_case(remat, quant)
  assert kernel_gradients(lifted_loss, case) == []
  assert len(kernel_gradients(merged_loss, case)) >= 7  # the check can see


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_no_leaf_of_the_decoder_lacks_a_rule(make_case, config, remat):
  case = make_case(remat)
  params = jlora.combine(case.frozen, case.trainable, case.spec)
  apply = jlora.lift(case.model.apply, on_missing='error')
  hidden = apply({'params': params}, case.tokens, method='hidden')
  apply({'params': params}, hidden, method='logits')
  positions = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
  mask = jnp.ones((2, 5, 8), bool)
  apply(
    {'params': params},
    case.tokens,
    positions,
    mask,
    make_cache(config, 2, 8, jnp.float32),
    jnp.int32(0),
    method='decode',
  )


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'nf4'])
def scanned(request):
  """Whether a scanned kernel is quantized; a loss by gather; its inputs."""
  params = {'kernel': jax.random.normal(jax.random.key(0), (3, 64, 64)) / 8}
  axes = {'.*': 'layers | in -> out'}
  spec = jlora.LoraSpec(rank=4, axes=axes)
  quant = jlora.QuantSpec(axes=axes) if request.param else None
  frozen, trainable = jlora.partition(
    jax.random.key(1), params, spec, quant=quant
  )
  trainable['kernel']['b'] += 0.1

  def layers(params, x):
    return jax.lax.scan(lambda h, k: (h @ k, None), x, params['kernel'])[0]

  def loss(gather, trainable, x):
    apply = jlora.lift(layers, gather=gather)
    return jnp.sin(apply(jlora.combine(frozen, trainable, spec), x)).sum()

  x = jax.random.normal(jax.random.key(2), (5, 64))
  return request.param, loss, (trainable, x)


def test_gather_is_given_each_part_of_a_layer_in_both_directions(scanned):
  quantized, loss, inputs = scanned
  seen = []

  def gather(path, part):
    is_adapter = isinstance(part, Adapter)
    shapes = (part.a.shape, part.b.shape) if is_adapter else part.shape
    seen.append((path, type(part), shapes))
    return part

  value = functools.partial(loss, gather)
  jax.eval_shape(value, *inputs)
  kinds = {kind for _, kind, _ in seen}
  base = QuantizedArray if quantized else (kinds - {Adapter}).pop()
  of_base, of_adapter = (
    ('0/kernel', base, (64, 64)),
    ('0/kernel', Adapter, ((64, 4), (4, 64))),
  )
  assert set(seen) == {of_base, of_adapter}
  forward = seen.count(of_base)
  seen.clear()
  jax.eval_shape(jax.grad(value, (0, 1)), *inputs)
  assert set(seen) == {of_base, of_adapter}
  assert seen.count(of_base) > forward


def test_a_gather_that_moves_nothing_leaves_the_program_as_it_is(scanned):
  _, loss, inputs = scanned
  programs = [
    str(
      jax.make_jaxpr(
        jax.value_and_grad(functools.partial(loss, gather), (0, 1))
      )(*inputs)
    )
    for gather in (None, lambda path, part: part)
  ]
  assert programs[0] == programs[1]


def test_what_gather_returns_is_what_is_used(scanned):
  _, loss, (trainable, x) = scanned

  def gather(path, part):
    del path
    if isinstance(part, Adapter):
      return part._replace(b=2 * part.b)
    return part

  doubled = {
    'kernel': trainable['kernel'] | {'b': 2 * trainable['kernel']['b']}
  }
  np.testing.assert_array_equal(
    loss(gather, trainable, x), loss(None, doubled, x)
  )


@pytest.fixture(scope='module')
def kernel():
  base = jax.random.normal(jax.random.key(0), (6, 6))
  frozen, trainable = jlora.partition(
    jax.random.key(1), {'kernel': base}, jlora.LoraSpec(rank=2)
  )
  trainable['kernel']['b'] += 1.0
  leaf = jlora.combine(frozen, trainable, jlora.LoraSpec(rank=2))['kernel']
  dense = jlora.merge(frozen, trainable, jlora.LoraSpec(rank=2))['kernel']
  return leaf, dense


def test_a_missing_rule_is_reported_once_with_path_and_operation(kernel):
  leaf, dense = kernel

  def fn(params):
    return jnp.sin(params['w']) + jnp.sin(params['w'])

  with pytest.warns(
    UserWarning, match=r"'sin' in .* has no rule .*'0/w'"
  ) as caught:
    result = jlora.lift(fn)({'w': leaf})
  assert len(caught) == 1
  np.testing.assert_allclose(result, fn({'w': dense}), rtol=1e-5)


def test_a_missing_rule_can_be_an_error(kernel):
  run = jlora.lift(lambda w: jnp.sin(w), on_missing='error')
  with pytest.raises(TypeError, match=r"'sin' in .* has no rule"):
    run(kernel[0])


def test_on_missing_is_one_of_two_words():
  with pytest.raises(ValueError, match="on_missing is 'ignore'"):
    jlora.lift(lambda w: w, on_missing='ignore')


def test_a_lazy_result_comes_back_dense(kernel):
  leaf, dense = kernel
  with pytest.warns(UserWarning, match='being returned'):
    result = jlora.lift(lambda w: {'same': w})(leaf)
  np.testing.assert_allclose(result['same'], dense, rtol=1e-6)


def test_the_signature_is_kept(make_case):
  apply = make_case().model.apply
  assert inspect.signature(jlora.lift(apply)) == inspect.signature(apply)


def test_what_is_no_array_reaches_the_function_as_it_is(kernel):
  leaf, dense = kernel
  seen = []

  def fn(x, w, flag, *, mode, factor, rest):
    seen.extend([flag, mode, factor, rest])
    return x @ w * factor if flag else x

  x = jnp.ones((2, 6), jnp.float32)
  result = jlora.lift(fn)(x, leaf, True, mode='a', factor=2.0, rest=(None, len))
  assert seen == [True, 'a', 2.0, (None, len)]
  assert type(seen[2]) is float
  np.testing.assert_allclose(result, x @ dense * 2, rtol=1e-5)


def test_a_python_number_does_not_raise_the_dtype(kernel):
  leaf = kernel[0].astype(jnp.bfloat16)
  x = jnp.ones((2, 6), jnp.bfloat16)
  result = jlora.lift(lambda x, w, c: x @ w * c)(x, leaf, 0.5)
  assert result.dtype == jnp.bfloat16


def test_rngs_and_mutable_collections_pass_through():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      calls = self.variable('stats', 'calls', lambda: jnp.zeros(()))
      calls.value += 1
      x = nn.Dense(4, use_bias=False)(x)
      return nn.Dropout(0.5, deterministic=not train)(x)

  x, rngs = jnp.ones((3, 6)), {'dropout': jax.random.key(1)}
  variables = Noisy().init(jax.random.key(0), x, False)
  spec = jlora.LoraSpec(rank=2)
  frozen, trainable = jlora.partition(
    jax.random.key(0), variables['params'], spec
  )
  lazy = variables | {'params': jlora.combine(frozen, trainable, spec)}
  settings = {'rngs': rngs, 'mutable': ['stats']}
  ours = jlora.lift(Noisy().apply)(lazy, x, True, **settings)
  theirs = Noisy().apply(variables, x, True, **settings)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs
  )


def test_without_lazy_leaves_the_function_runs_untraced():
  result = jlora.lift(lambda x: type(x))(np.ones(3))
  assert result is np.ndarray


def test_lift_works_under_vmap(kernel):
  leaf, dense = kernel
  x = jax.random.normal(jax.random.key(2), (4, 3, 6))
  run = jax.vmap(jlora.lift(lambda x, w: jnp.tanh(x @ w)), (0, None))
  np.testing.assert_allclose(
    run(x, leaf), jnp.tanh(x @ dense), rtol=1e-5, atol=1e-5
  )


def test_an_error_without_lazy_leaves_says_to_combine():
  model = nn.Dense(6)
  params = model.init(jax.random.key(0), jnp.ones((2, 6)))['params']
  _, trainable = jlora.partition(
    jax.random.key(0), params, jlora.LoraSpec(rank=2)
  )
  with pytest.raises(flax.errors.ScopeParamShapeError) as caught:
    jlora.lift(model.apply)({'params': trainable}, jnp.ones((2, 6)))
  notes = ' '.join(caught.value.__notes__)
  assert 'jlora.combine(frozen, trainable, spec)' in notes


def test_codes_have_no_derivative_and_jax_says_so():
  params = {'kernel': jnp.ones((6, 6))}
  frozen = jlora.quantize(params, jlora.QuantSpec(block_size=2))
  run = jlora.lift(lambda p, x: (x @ p['kernel']).sum())
  with pytest.raises(TypeError, match='but got uint8'):
    jax.grad(run)(frozen, jnp.ones((2, 6)))


def test_linen_compares_the_shape_of_codes_where_lift_was_forgotten():
  model = nn.Dense(6)
  params = model.init(jax.random.key(0), jnp.ones((2, 6)))['params']
  frozen = jlora.quantize(params, jlora.QuantSpec(block_size=2))
  with pytest.raises(flax.errors.ScopeParamShapeError, match=r'\(3, 6\)'):
    model.apply({'params': frozen}, jnp.ones((2, 6)))
