"""The kernels of GPUs and TPUs attend as the blockwise reference does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import kernels
from jlora.models.blockwise import Sight, attend_blockwise
from jlora.models.decoder import Decoder
from jlora.parallel.machines import find_machine
from jlora.parallel.mesh import by_example, make_mesh, replicated
from jlora.parallel.topology import devices_of
from tests.decoders import CONFIG

LENGTH, SCALE = 130, 0.2
SEGMENTS = jnp.repeat(jnp.arange(3), jnp.array([50, 60, 20]))[None]


def make_operands(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = [(1, LENGTH, heads, 16) for heads in (4, 2, 2)]
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def value_and_grads(fn, operands):
  def loss(*operands):
    out = fn(*operands).reshape(1, LENGTH, -1).astype(jnp.float32)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*operands)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  ('kernel', 'reach', 'cap'),
  [
    (kernels.triton, None, None),
    (kernels.splash, None, None),
    (kernels.splash, 40, 0.5),
  ],
  ids=['triton', 'splash', 'splash, capped window'],
)
def test_a_kernel_attends_as_the_reference(kernel, reach, cap):
  operands = make_operands()
  found = value_and_grads(
    lambda *x: kernel(
      *x, SEGMENTS, reach=reach, scale=SCALE, cap=cap, interpret=True
    ),
    operands,
  )
  sight = Sight(SEGMENTS, reach)
  expected = value_and_grads(
    lambda *x: attend_blockwise(*x, sight, scale=SCALE, cap=cap), operands
  )
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    # Sums over up to 4 * 130 products, rounded in another order.
    np.testing.assert_allclose(a, b, atol=64 * 2**-24 * float(jnp.abs(b).max()))


def test_what_no_kernel_takes_is_done_blockwise():
  half, single = (make_operands(t)[0] for t in (jnp.bfloat16, jnp.float32))
  packed, whole = Sight(SEGMENTS), Sight()
  some = Sight(None, jnp.int32(40))
  choose = kernels._kernel_for
  assert choose('cuda', half, whole, None) is kernels.cudnn
  assert choose('cuda', half, packed, None) is kernels.triton
  assert choose('cuda', single, packed, None) is None
  assert choose('cuda', half, packed, 50.0) is None
  assert choose('cuda', half, Sight(SEGMENTS, 40), None) is None
  assert choose('cuda', half, some, None) is None
  assert choose('tpu', single, Sight(SEGMENTS, 40), 50.0) is kernels.splash
  assert choose('tpu', half, some, None) is None


LONG = dataclasses.replace(
  CONFIG,
  vocab_size=64,
  embed_dim=128,
  heads=4,
  kv_heads=2,
  head_dim=64,
  max_positions=4096,
)


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  ('target', 'width', 'packed', 'kernel'),
  [
    ('h100', 64, False, 'fmha'),
    ('h100-2', 64, False, 'fmha'),
    ('h100', 64, True, 'triton'),
    ('h100-2', 64, True, 'triton'),
    ('h100', 128, True, 'triton'),
    ('a6000', 128, False, 'fmha'),
    ('a6000', 128, True, 'triton'),  # of the least shared memory
    ('v5e-1', 64, True, 'splash'),
    ('v5e-4', 64, True, 'splash'),
  ],
)
def test_elsewhere_a_step_is_compiled_with_a_kernel(
  target, width, packed, kernel
):
  machine = find_machine(target)
  mesh = make_mesh(-1, devices=devices_of(machine))
  config = dataclasses.replace(LONG, head_dim=width)
  model = Decoder(
    config, dtype=jnp.bfloat16, remat='full', attend=kernels.make_attend(mesh)
  )
  tokens = jax.ShapeDtypeStruct(
    (machine.devices, 4096), jnp.int32, sharding=by_example(mesh)
  )
  params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    params,
  )

  def loss(params, tokens):
    hidden = functools.partial(model.apply, method='hidden')
    ids = tokens if packed else None
    out = hidden(params, tokens, segment_ids=ids)
    return out.astype(jnp.float32).var()

  traced = jax.jit(jax.grad(loss)).trace(params, tokens)
  lowered = traced.lower(lowering_platforms=(machine.platform,))
  text = lowered.compile().as_text()
  assert kernel in text
  shapes = re.findall(r'[a-z]+\d*\[([\d,]+)\]', text)
  assert not any(s.split(',').count('4096') > 1 for s in shapes)
