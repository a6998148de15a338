import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core.axes import parse_roles
from jlora.core.linear import Adapter, linear
from jlora.core.quantization import quantize_leaf
from jlora.core.quantized import dequantize_leaf

IN, OUT, RANK, SCALE = 128, 48, 5, 1.75


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=['dense', 'quantized'])
def kernel(request):
  kernel = normal(0, IN, OUT) / IN**0.5
  if request.param == 'dense':
    return kernel
  return quantize_leaf(kernel, parse_roles('in -> out'), jlora.QuantSpec())


@pytest.fixture
def adapter():
  a, b = normal(1, IN, RANK) / IN**0.5, normal(2, RANK, OUT)
  return Adapter(a, b, jnp.float32(SCALE))


def plain(x, kernel, adapter, branch=None):
  """The definition, by plain autodiff."""
  if not isinstance(kernel, jax.Array):
    kernel = dequantize_leaf(kernel)
  y = x @ kernel
  if adapter is None:
    return y
  branch = x if branch is None else branch
  return y + SCALE * (branch @ adapter.a) @ adapter.b


def assert_near(ours, theirs):
  """Within 1e-5 of the norm: some 100 roundings of float32."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize('leading', [(), (7,), (2, 7), (2, 3, 7)])
def test_the_value_is_the_definition(kernel, adapter, leading):
  x = normal(3, *leading, IN)
  assert_near(linear(x, kernel, adapter), plain(x, kernel, adapter))
  assert_near(linear(x, kernel), plain(x, kernel, None))


@pytest.mark.parametrize('with_adapter', [True, False])
def test_gradients_are_those_of_the_definition(kernel, adapter, with_adapter):
  adapter = adapter if with_adapter else None
  x, target = normal(3, 2, 7, IN), normal(4, 2, 7, OUT)

  def loss(f, x, adapter):
    return jnp.sum((f(x, kernel, adapter) - target) ** 2)

  ours = jax.grad(loss, (1, 2))(linear, x, adapter)
  theirs = jax.grad(loss, (1, 2))(plain, x, adapter)
  assert_near(ours[0], theirs[0])
  if with_adapter:
    assert_near(ours[1].a, theirs[1].a)
    assert_near(ours[1].b, theirs[1].b)


def test_a_separate_branch_has_a_gradient_of_its_own(kernel, adapter):
  x, branch, target = normal(3, 7, IN), normal(5, 7, IN), normal(4, 7, OUT)

  def ours(x, branch, adapter):
    return jnp.sum((linear(x, kernel, adapter, branch=branch) - target) ** 2)

  def theirs(x, branch, adapter):
    return jnp.sum((plain(x, kernel, adapter, branch) - target) ** 2)

  one = jax.grad(ours, (0, 1, 2))(x, branch, adapter)
  two = jax.grad(theirs, (0, 1, 2))(x, branch, adapter)
  for mine, oracle in zip(one[:2], two[:2], strict=True):
    assert_near(mine, oracle)
  assert_near(one[2].a, two[2].a)
  assert_near(one[2].b, two[2].b)


def test_kernel_and_scale_are_constants(adapter):
  kernel = normal(0, IN, OUT)

  def loss(kernel, scale):
    return linear(normal(3, 7, IN), kernel, adapter._replace(scale=scale)).sum()

  grads = jax.grad(loss, (0, 1))(kernel, adapter.scale)
  assert not any(map(np.any, grads))


def test_no_dense_kernel_is_kept_for_the_backward_pass(adapter):
  kernel = quantize_leaf(
    normal(0, IN, OUT), parse_roles('in -> out'), jlora.QuantSpec()
  )
  _, pull = jax.vjp(lambda x: linear(x, kernel, adapter), normal(3, 7, IN))
  kept = [x.shape for x in jax.tree.leaves(pull) if x.size >= IN * OUT]
  assert kept == []
  assert (7, IN) in [x.shape for x in jax.tree.leaves(pull)]


def test_a_scan_over_layers_holds_one_dense_kernel_at_a_time():
  layers, size = 8, 256
  kernels = jax.eval_shape(
    lambda: quantize_leaf(
      jnp.zeros((layers, size, size)),
      parse_roles('layers | in -> out'),
      jlora.QuantSpec(),
    )
  )

  def loss(x, kernels):
    def body(h, kernel):
      return jnp.sin(linear(h, kernel)), None

    return jax.lax.scan(body, x, kernels)[0].sum()

  x = jax.ShapeDtypeStruct((4, size), jnp.float32)
  compiled = jax.jit(jax.grad(loss)).lower(x, kernels).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= 1.5 * 4 * size**2


def test_no_product_has_the_shape_of_the_kernel(kernel, adapter):
  def loss(x, adapter):
    return linear(x, kernel, adapter).sum()

  grad = jax.make_jaxpr(jax.grad(loss, (0, 1)))(normal(3, 7, IN), adapter)
  products = str(grad).split('dot_general')[:-1]
  shapes = [line.rsplit('\n', 1)[-1] for line in products]
  assert len(shapes) == 8
  for shape in (f'[{IN},{OUT}]', f'[{OUT},{IN}]'):
    assert not any(shape in line for line in shapes)


def test_bfloat16_is_off_by_its_roundings_only(adapter):
  kernel = (normal(0, IN, OUT) / IN**0.5).astype(jnp.bfloat16)
  x = normal(3, 64, IN).astype(jnp.bfloat16)
  ours = np.asarray(linear(x, kernel, adapter), np.float64)
  x, kernel, a, b = (
    np.asarray(part, np.float64) for part in (x, kernel, adapter.a, adapter.b)
  )
  base, branch = x @ kernel, SCALE * (x @ a) @ b
  u = 2.0**-8  # unit roundoff: base, branch and sum are rounded to it once,
  bound = u * (np.abs(base) + np.abs(branch) + np.abs(base + branch))
  bound += 2 * u * SCALE * (np.abs(x) @ np.abs(a)) @ np.abs(b)  # and a, b too
  bound *= 1 + 4 * u  # products of roundings, and float32 accumulation
  assert (np.abs(ours - (base + branch)) <= bound).all()


def test_the_branch_never_raises_the_dtype_of_the_base(adapter):
  kernel = normal(0, IN, OUT).astype(jnp.bfloat16)
  x = normal(3, 7, IN).astype(jnp.bfloat16)
  y, pull = jax.vjp(lambda x: linear(x, kernel, adapter), x)
  assert y.dtype == jnp.bfloat16
  assert pull(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize('x_dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kernel_dtype', [jnp.float32, jnp.bfloat16])
def test_dtypes_of_input_and_kernel_may_differ(adapter, x_dtype, kernel_dtype):
  kernel = normal(0, IN, OUT).astype(kernel_dtype)
  x = normal(3, 7, IN).astype(x_dtype)
  for branch in (adapter, None):

    def loss(x, branch=branch):
      return linear(x, kernel, branch, dtype=jnp.float32).sum()

    assert jax.grad(loss)(x).dtype == x_dtype


def test_adapter_gradients_are_float32(adapter):
  kernel = normal(0, IN, OUT).astype(jnp.bfloat16)
  x = normal(3, 7, IN).astype(jnp.bfloat16)
  grads = jax.grad(lambda p: linear(x, kernel, p).sum())(adapter)
  assert {grads.a.dtype, grads.b.dtype} == {jnp.dtype('float32')}


def test_the_result_has_the_dtype_that_is_asked_for(kernel, adapter):
  y = linear(normal(3, 7, IN), kernel, adapter, dtype=jnp.bfloat16)
  assert y.dtype == jnp.bfloat16


def test_forward_mode_is_refused(kernel, adapter):
  x = normal(3, 7, IN)
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(lambda x: linear(x, kernel, adapter), (x,), (x,))
