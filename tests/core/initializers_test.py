import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jlora.core import decompositions, initializers
from jlora.core.axes import Roles
from jlora.core.initializers import start
from jlora.core.lora import INITS, Strength
from jlora.core.quantization import QuantSpec, quantize_leaf
from jlora.core.quantized import dequantize_leaf
from jlora.errors import ConfigError

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(0)


@jax.jit
def nf4(kernel):
  roles = Roles((), ('in',), ('out',))
  return dequantize_leaf(quantize_leaf(kernel, roles, QuantSpec()))


def round_off(kernel):
  """A coarse grid for each output, which compiles faster than NF4."""
  step = jnp.abs(kernel).max(axis=0, keepdims=True) / 7
  return step * jnp.round(kernel / step)


def make_kernel(*shape, decay=0.5, seed=0):
  """Random singular vectors, with the i-th singular value i^-decay.

  With 0.5 and 256 of them, the first 16 hold 55 % of the energy. Of
  SmolLM2-135M's, those of the first layer's q and k hold 68 and 76 %, those of
  other attention kernels 13 to 40 %, and those of the mlp 8 to 15 %.
  """
  normal = np.random.default_rng(seed).standard_normal(shape)
  u, values, vt = np.linalg.svd(normal, full_matrices=False)
  values = np.arange(1, values.shape[-1] + 1) ** -decay
  return jnp.asarray((u * values) @ vt, jnp.float32)


def make_strength(ranks, scales):
  return Strength(np.array(ranks), np.array(scales, np.float32))


class Begun(NamedTuple):
  a: jax.Array
  b: jax.Array
  residual: jax.Array | None


def run(init, kernel, ranks, scales=1.0, jit=True, **options):
  """Starts a kernel's adapter; one rank and scale is that of every layer."""
  *stacked, size, out = kernel.shape
  ranks, scales = (
    np.broadcast_to(ranks, stacked),
    np.broadcast_to(scales, stacked),
  )
  strength = make_strength(ranks, scales)
  options = {'round_trip': round_off} | options

  def begin(kernel):
    shape = (tuple(stacked), size, out)
    first = start(init, KEY, shape, strength, kernel=kernel, **options)
    if init in ('lora', 'gaussian'):
      return Begun(first.a, first.b, None)
    residual = initializers.take_out(kernel, first, strength)
    return Begun(first.a, first.b, residual)

  return (jax.jit(begin) if jit else begin)(kernel)


def update_of(begun, scales=1.0):
  a, b = np.asarray(begun.a, 'f8'), np.asarray(begun.b, 'f8')
  return np.asarray(scales)[..., None, None] * (a @ b)


def best_error(matrix, rank):
  values = np.linalg.svd(np.asarray(matrix, 'f8'), compute_uv=False)
  return np.sqrt((values[rank:] ** 2).sum())


@pytest.mark.parametrize('init', INITS)
def test_shapes_are_known_without_arrays(init):
  kernel = jax.ShapeDtypeStruct((2, 3, 64, 24), jnp.bfloat16)
  begun = jax.eval_shape(functools.partial(run, init, ranks=4), kernel)
  expected = {'a': (2, 3, 64, 4), 'b': (2, 3, 4, 24)}
  if init in ('pissa', 'olora', 'loftq'):
    expected['residual'] = kernel.shape
  kept = {k: v for k, v in begun._asdict().items() if v is not None}
  assert {k: v.shape for k, v in kept.items()} == expected
  assert {v.dtype for v in kept.values()} == {jnp.dtype('float32')}


@pytest.mark.parametrize('init', ['pissa', 'olora', 'loftq'])
def test_starting_twice_gives_the_same_bits(init):
  kernel = make_kernel(2, 64, 24)
  first, second = (run(init, kernel, [3, 2], [0.5, 2]) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_lora_is_uniform_and_stacked_axes_are_no_fan_in():
  a, b, residual = run('lora', jnp.zeros((8, 64, 24)), 16)
  assert not b.any()
  assert residual is None
  assert np.abs(a).max() <= 1 / 8
  # 8192 draws: the largest is below 0.999 of the bound once in 3600 seeds.
  assert np.abs(a).max() > 0.999 / 8
  np.testing.assert_array_equal(a, initializers.uniform_a(KEY, (8,), 64, 16))


@pytest.mark.parametrize(
  ('init', 'one_hot', 'deviations'),
  [
    ('gaussian', False, (1 / 16, 1 / 4)),
    ('gaussian', True, (1, 1)),
    ('lora', True, (1, 1)),
  ],
)
def test_normal_starts_have_their_deviation(init, one_hot, deviations):
  a, b, residual = run(init, jnp.zeros((2, 512, 24)), [16, 4], one_hot=one_hot)
  assert not b.any()
  assert residual is None
  for layer, rank, expected in zip(a, (16, 4), deviations, strict=True):
    draws = layer[:, :rank]
    # A deviation over n draws has a relative error of 1 / sqrt(2 n).
    assert abs(draws.std() / expected - 1) < 5 / np.sqrt(2 * draws.size)
    assert not layer[:, rank:].any()


@pytest.mark.parametrize('shape', [(3, 64, 24), (3, 24, 64)])
@pytest.mark.parametrize('init', ['pissa', 'olora'])
def test_residual_and_update_are_the_kernel(init, shape):
  kernel, scales = make_kernel(*shape), np.array([1, 2, 0.25])
  begun = run(init, kernel, [4, 3, 2], scales)
  error = np.abs(begun.residual + update_of(begun, scales) - kernel)
  size = np.abs(begun.a) @ np.abs(begun.b) * scales[:, None, None]
  # One rounding for each product and sum of the update, and one more.
  assert (error <= EPS * (5 * size + np.abs(kernel))).all()


@pytest.mark.parametrize('shape', [(64, 24), (24, 64), (32, 32)])
def test_pissa_takes_out_the_best_approximation(shape):
  kernel = make_kernel(*shape)
  begun = run('pissa', kernel, 5, 2.0)
  error = np.linalg.norm(kernel - update_of(begun, 2.0))
  # Rounding moves a projection; its error depends on that to second order.
  assert error == pytest.approx(best_error(kernel, 5), rel=10 * EPS)


def test_pissa_shares_singular_values_between_the_factors():
  begun = run('pissa', make_kernel(64, 24), 5, 2.0)
  expected = np.diag(np.arange(1, 6) ** -0.5 / 2)
  for gram in (begun.a.T @ begun.a, begun.b @ begun.b.T):
    # Eigenvectors turn by eps over the gap of their squares, here 1/4 - 1/5.
    np.testing.assert_allclose(gram, expected, atol=64 * EPS / 0.05)


def test_olora_takes_the_first_inputs_out_by_an_orthonormal_b():
  a, b, residual = run('olora', make_kernel(64, 24), 5)
  np.testing.assert_allclose(b @ b.T, np.eye(5), atol=24 * EPS)
  np.testing.assert_allclose(residual[:5], 0, atol=24 * EPS)
  np.testing.assert_allclose(residual @ b.T, 0, atol=24 * EPS)
  np.testing.assert_allclose(np.triu(a[:5].T, 0), a[:5].T, atol=24 * EPS)


@pytest.mark.parametrize(('init', 'gate'), [('pissa', 1.03), ('olora', 1.2)])
def test_less_is_lost_to_4_bits(init, gate):
  kernel = make_kernel(256, 256)
  begun = run(init, kernel, 16)
  lost = np.linalg.norm(kernel - nf4(kernel))
  still = np.linalg.norm(begun.residual - nf4(begun.residual))
  assert still < lost / gate


def loftq_errors(kernel, rank, turns):
  begin = jax.jit(
    functools.partial(decompositions.loftq, width=rank, round_trip=nf4)
  )
  for n in turns:
    begun = begin(kernel, rank, jnp.float32(0.5), iterations=n)
    residual = initializers.take_out(kernel, begun, make_strength(rank, 0.5))
    yield np.linalg.norm(kernel - nf4(residual) - update_of(begun, 0.5))


def plain_errors(kernel, rank, turns):
  """Those of LoftQ as published, where the last turn is taken."""
  update = 0
  for _ in turns:
    lost = kernel - nf4(kernel - update)
    u, values, vt = np.linalg.svd(lost, full_matrices=False)
    update = (u[:, :rank] * values[:rank]) @ vt[:rank]
    yield np.linalg.norm(lost - update)


@pytest.mark.parametrize('rank', [4, 32])
def test_more_turns_of_loftq_never_lose_more(rank):
  kernel, turns = make_kernel(64, 48), range(1, 8)
  errors = list(loftq_errors(kernel, rank, turns))
  plain = list(plain_errors(kernel, rank, turns))
  assert (max(plain[1:]) > 1.01 * plain[0]) == (rank == 32)
  assert errors[0] < np.linalg.norm(kernel - nf4(kernel))
  # Which turn is better is told from sums rounded in float32.
  assert all(b <= a * (1 + 48 * EPS) for a, b in itertools.pairwise(errors))
  # Rounding moves single codes, so the errors agree but roughly.
  assert errors[-1] == pytest.approx(min(plain), rel=0.02)


def test_one_turn_of_loftq_leaves_the_kernel_to_be_quantized():
  kernel = make_kernel(64, 48)
  begun = decompositions.loftq(
    kernel, 4, 0.5, width=4, round_trip=round_off, iterations=1
  )
  assert not any(factor.any() for factor in begun.taken)


def test_quantizing_what_loftq_leaves_gives_what_it_fitted():
  kernel = make_kernel(3, 64, 48)
  begun = run('loftq', kernel, [4, 8, 6], 0.5, round_trip=nf4)
  for i, rank in enumerate((4, 8, 6)):
    lost = kernel[i] - nf4(begun.residual[i])
    error = np.linalg.norm(lost - update_of(begun, 0.5)[i])
    assert error == pytest.approx(best_error(lost, rank), rel=10 * EPS)
    assert rank == np.linalg.matrix_rank(update_of(begun)[i])


@pytest.mark.parametrize('init', ['pissa', 'olora', 'loftq'])
def test_a_layer_starts_as_it_would_alone(init):
  kernel = make_kernel(3, 1, 64, 24)
  ranks, scales = np.array([[3], [0], [2]]), np.array([[1], [0], [0.5]])
  begun = run(init, kernel, ranks, scales)
  for i in ((0, 0), (2, 0)):
    alone = run(init, kernel[i], ranks[i], scales[i])
    layer = jax.tree.map(lambda x, i=i: x[i], begun)
    pairs = [(f(layer), f(alone)) for f in (update_of, lambda x: x.residual)]
    for found, expected in pairs:
      np.testing.assert_allclose(found, expected, atol=64 * EPS)
    assert layer.a[:, : ranks[i]].any(axis=0).all()
    assert not layer.a[:, ranks[i] :].any()
    assert not layer.b[ranks[i] :].any()
  assert not begun.a[1].any()
  assert not begun.b[1].any()
  np.testing.assert_array_equal(begun.residual[1], kernel[1])


@pytest.mark.parametrize('init', ['pissa', 'olora', 'loftq'])
def test_scratch_does_not_grow_with_the_stack(init):
  def scratch(layers):
    kernel = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32)
    begin = jax.jit(functools.partial(run, init, ranks=4, jit=False))
    return begin.lower(kernel).compile().memory_analysis().temp_size_in_bytes

  factors = 30 * 2 * 64 * 4 * 4 if init == 'loftq' else 0  # those taken out
  assert scratch(32) < scratch(2) + factors + 64 * 64 * 4


@pytest.mark.parametrize('init', ['pissa', 'olora'])
def test_it_is_the_start_that_peft_makes(init):
  kernel = make_kernel(24, 16)
  linear = torch.nn.Linear(24, 16, bias=False)
  linear.weight.data = torch.tensor(np.asarray(kernel).T.copy())
  config = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=['0'], init_lora_weights=init
  )
  model = peft.get_peft_model(torch.nn.Sequential(linear), config)
  layer = model.base_model.model[0]
  begun = run(init, kernel, 4, 2.0)
  delta = layer.get_delta_weight('default').detach().numpy().T
  base = layer.base_layer.weight.detach().numpy().T
  # Both subspaces turn by eps over the gap of the squares, 1/4 - 1/5.
  atol = 2 * 24 * EPS / 0.05
  np.testing.assert_allclose(update_of(begun, 2.0), delta, atol=atol)
  np.testing.assert_allclose(begun.residual, base, atol=atol)
  if init == 'olora':
    a = layer.lora_A['default'].weight.detach().numpy().T
    np.testing.assert_allclose(begun.a, a, atol=atol)


def test_a_kernel_of_zeros_stays_one():
  begun = run('pissa', jnp.zeros((8, 6)), 2)
  assert not any(x.any() for x in begun)


@pytest.mark.parametrize('init', ['pissa', 'olora', 'loftq'])
def test_a_start_from_the_kernel_needs_one(init):
  with pytest.raises(ConfigError, match=f"'{init}' starts from the kernel"):
    start(init, KEY, ((), 8, 6), make_strength(2, 1), round_trip=round_off)
