"""Which products are done on the way, and that they are the same as others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.core.axes import parse_roles
from jlora.core.kernels import choice, few_rows
from jlora.core.linear import Adapter, linear
from jlora.core.quantization import quantize_leaf
from jlora.core.quantized import decode_matrices

IN, OUT, ROWS = 128, 96, 3
CALL = '__gpu$xla.gpu.triton'  # in a lowered program, a kernel of Pallas


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def quantized(*shape, roles='in -> out', **fields):
  kernel = normal(0, *shape) / shape[-2] ** 0.5
  return quantize_leaf(kernel, parse_roles(roles), jlora.QuantSpec(**fields))


@pytest.fixture(scope='module')
def kernel(quick_jit):
  return quick_jit(lambda: quantized(IN, OUT))()


@pytest.fixture(scope='module')
def dense(quick_jit, kernel):
  return quick_jit(decode_matrices)(kernel)


@pytest.fixture(scope='module')
def experts(quick_jit):
  roles = 'experts | in -> out'
  return quick_jit(lambda: quantized(4, IN, OUT, roles=roles))()


@pytest.fixture(scope='module')
def adapter():
  a, b = normal(1, IN, 4) / IN**0.5, normal(2, 4, OUT)
  return Adapter(a, b, jnp.float32(1.5))


def loss(x, kernel, adapter=None):
  return jnp.sum(jnp.sin(linear(x, kernel, adapter)))


def calls(f, *args, platform='cuda', sharding=None):
  """Returns how many kernels of Pallas a program for one platform has."""
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
  )
  lowered = jax.jit(f).trace(*shapes).lower(lowering_platforms=(platform,))
  return lowered.as_text().count(CALL)


def test_on_one_gpu_both_passes_decode_on_the_way(kernel, adapter):
  step = jax.value_and_grad(loss)
  assert calls(step, normal(3, ROWS, IN), kernel, adapter) == 2


@pytest.mark.parametrize('platform', ['cpu', 'tpu', 'rocm'])
def test_elsewhere_kernels_are_decoded_first(kernel, platform):
  x = normal(3, ROWS, IN)
  assert calls(linear, x, kernel, platform=platform) == 0


@pytest.mark.parametrize('devices', [1, 2])
def test_what_several_devices_share_is_decoded_first(kernel, devices):
  sharding = NamedSharding(AbstractMesh((devices,), ('data',)), P())
  found = calls(linear, normal(3, ROWS, IN), kernel, sharding=sharding)
  assert found == (devices == 1)


def test_parts_of_a_shard_map_are_decoded_first(kernel):
  """Its products may vary over the mesh in ways that shapes do not tell."""
  mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    linear, mesh=mesh, in_specs=(P('data'), P()), out_specs=P('data')
  )
  x = normal(3, ROWS, IN)
  assert choice.product_p.name in str(jax.make_jaxpr(linear)(x, kernel))
  assert choice.product_p.name not in str(jax.make_jaxpr(mapped)(x, kernel))


OTHERS = {
  'too many rows': ((128, 96), {}, {'rows': choice.ROWS + 1}),
  'no rows': ((128, 96), {}, {'rows': 0}),
  'eight bits': ((128, 96), {'format': 'int8'}, {}),
  'outputs that no tile divides': ((128, 80), {}, {}),
  'small blocks': ((128, 96), {'block_size': 16}, {}),
  'odd blocks': ((128, 96), {'block_size': 48}, {}),
  'an algorithm': ((128, 96), {}, {'precision': 'BF16_BF16_F32'}),
}


@pytest.mark.parametrize('case', OTHERS)
def test_other_products_are_decoded_first(case):
  shape, fields, given = OTHERS[case]
  x = jnp.zeros((given.pop('rows', ROWS), shape[0]))
  run = functools.partial(linear, **given)
  kernel = jax.eval_shape(lambda: quantized(*shape, **fields))
  assert calls(run, x, kernel) == 0


def test_products_with_dense_kernels_are_as_they_were():
  assert calls(linear, normal(3, ROWS, IN), normal(0, IN, OUT)) == 0


@pytest.fixture
def interpreted(monkeypatch):
  """Runs what one GPU would, by Pallas' interpreter; counts the products."""
  multiply, ran = few_rows.multiply, []

  def run(*args, **settings):
    ran.append(settings['transposed'])
    return multiply(*args, **settings, interpret=True)

  def bind(way, rows, kernel, depth=0):
    leaves, tree = jax.tree.flatten(kernel)
    return choice._fused(rows, *leaves, way=way, tree=tree, depth=depth)

  monkeypatch.setattr(few_rows, 'multiply', run)
  monkeypatch.setattr(choice, '_bind', bind)
  return ran


@pytest.mark.parametrize('transposed', [False, True])
def test_value_and_gradients_are_those_of_decoding_first(
  request, kernel, adapter, assert_near, quick_jit, transposed
):
  if transposed:
    adapter = Adapter(adapter.b.T, adapter.a.T, adapter.scale)
  x = normal(3, 1, ROWS, OUT if transposed else IN)

  def results(x, a, b):
    def run(x, a, b):
      side = Adapter(a, b, adapter.scale)
      y = linear(x, kernel, side, transposed=transposed)
      return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(run, (0, 1, 2), has_aux=True)(x, a, b)

  first = quick_jit(results)(x, adapter.a, adapter.b)
  ran = request.getfixturevalue('interpreted')
  again = quick_jit(lambda *args: results(*args))(x, adapter.a, adapter.b)
  assert_near(again, first)
  assert ran == [transposed, not transposed]


@pytest.mark.parametrize('way', ['on the way', 'first'])
def test_a_gather_comes_once_before_a_kernel_is_decoded(request, kernel, way):
  if way == 'on the way':
    request.getfixturevalue('interpreted')
  moved = dataclasses.replace(kernel, gather=_doubled)
  x = normal(3, ROWS, IN)
  np.testing.assert_allclose(linear(x, moved), 2 * linear(x, kernel), rtol=1e-6)


def _doubled(kernel):
  return dataclasses.replace(
    kernel, scales2=2 * kernel.scales2, offset=2 * kernel.offset
  )


def test_rows_that_are_mapped_are_more_rows(
  kernel, dense, assert_near, quick_jit
):
  x = normal(3, 2, 5, IN)
  mapped = jax.vmap(linear, (0, None))
  assert_near(quick_jit(mapped)(x, kernel), x @ dense)
  assert calls(mapped, x, kernel) == 1
  many = jnp.zeros((choice.ROWS, 2, IN))
  assert calls(mapped, many, kernel) == 0


@pytest.mark.parametrize('axis', [0, None])
def test_kernels_that_are_mapped_stay_one_call(
  experts, axis, assert_near, quick_jit
):
  x = normal(3, 4, 2, IN) if axis == 0 else normal(3, 2, IN)
  mapped = jax.vmap(linear, (axis, 0))
  y, expected = quick_jit(lambda x, k: (mapped(x, k), x @ decode_matrices(k)))(
    x, experts
  )
  assert_near(y, expected)
  assert calls(mapped, x, experts) == 1


def test_rows_of_each_kernel_that_are_mapped_are_more_rows(
  experts, assert_near, quick_jit
):
  mapped = jax.vmap(jax.vmap(linear), (1, None), 1)
  x = normal(3, 4, 5, 2, IN)
  assert calls(mapped, x, experts) == 1
  y, expected = quick_jit(
    lambda x, k: (mapped(x, k), x @ decode_matrices(k)[:, None])
  )(x, experts)
  assert_near(y, expected)


def test_a_derivative_has_a_derivative(kernel, dense, assert_near, quick_jit):
  def size(run):
    return jax.grad(lambda x: jnp.sum(jax.grad(run)(x) ** 2))

  x = normal(3, ROWS, IN)
  ours = quick_jit(size(lambda x: loss(x, kernel)))(x)
  theirs = quick_jit(size(lambda x: jnp.sum(jnp.sin(x @ dense))))(x)
  assert_near(ours, theirs)


def test_without_jit_it_is_compiled_once(kernel):
  x = normal(3, ROWS, IN)
  linear(x, kernel)
  before = choice._run._cache_size()
  linear(x + 1, kernel)
  assert choice._run._cache_size() == before > 0
