"""What compilers for GPUs make of products that decode on the way."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.core.axes import parse_roles
from jlora.core.kernels import choice
from jlora.core.linear import linear
from jlora.core.quantization import quantize_leaf
from jlora.inference import decoding
from jlora.inference.sampling import Sampling
from jlora.models import families
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.parallel import topology
from jlora.parallel.machines import find_machine
from jlora.parallel.mesh import make_mesh, replicated

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings('ignore')]

CALL = '__gpu$xla.gpu.triton'
IN, OUT = 1024, 2816
CONFIG = DecoderConfig(
  vocab_size=4096,
  embed_dim=IN,
  mlp_dim=OUT,
  layers=4,
  heads=16,
  kv_heads=4,
  head_dim=64,
)
BATCH = 2


def compiled(target, f, *args):
  """Compiles for one device; `f` is jitted."""
  whole = replicated(
    make_mesh(devices=topology.devices_of(find_machine(target)))
  )
  args = [
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arg
    )
    if not isinstance(arg, decoding.Setup)
    else arg
    for arg in args
  ]
  return f.trace(*args).lower(lowering_platforms=('cuda',)).compile()


def floats(program):
  """Returns how many numbers each array of floats has that is in memory or not.

  Fusions count with all they hold: nothing like a dense kernel is to be there.
  """
  shapes = re.findall(r'\b(?:f32|bf16)\[([\d,]+)\]', program.as_text())
  return {math.prod(map(int, shape.split(','))) for shape in shapes}


def product(x, kernel):
  """Value and derivative: the kernel, and the kernel transposed."""
  y, pull = jax.vjp(lambda x: linear(x, kernel), x)
  return y, pull(y)


@pytest.mark.parametrize('target', ['h100', 'a6000'])
@pytest.mark.parametrize('rows', [1, 32])
def test_a_product_never_holds_a_dense_kernel(monkeypatch, target, rows):
  kernel = jax.eval_shape(
    lambda: quantize_leaf(
      jnp.zeros((IN, OUT), jnp.bfloat16),
      parse_roles('in -> out'),
      jlora.QuantSpec(),
    )
  )
  x = jax.ShapeDtypeStruct((rows, IN), jnp.bfloat16)
  ours = compiled(target, jax.jit(product), x, kernel)
  assert ours.as_text().count(CALL) == 2
  assert max(floats(ours)) < IN * OUT / 4
  scratch = ours.memory_analysis().temp_size_in_bytes
  assert scratch < kernel.codes.size

  monkeypatch.setattr(choice, 'ROWS', 0)
  theirs = compiled(target, jax.jit(lambda *args: product(*args)), x, kernel)
  assert theirs.as_text().count(CALL) == 0
  assert IN * OUT in floats(theirs)
  assert theirs.memory_analysis().temp_size_in_bytes >= 2 * IN * OUT
  print(target, rows, scratch, theirs.memory_analysis().temp_size_in_bytes)


def step():
  """Returns a decoding step's setup and abstract arguments."""
  model = Decoder(CONFIG, dtype=jnp.bfloat16)
  tokens = jax.ShapeDtypeStruct((BATCH, 8), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
  )
  quant = families.resolve(jlora.QuantSpec(), CONFIG)
  params = jlora.quantize(params, quant)
  setup = decoding.Setup(
    jlora.lift(model.apply),
    CONFIG,
    Sampling(max_new_tokens=64, temperature=0.0),
    (0,),
    jnp.dtype(jnp.bfloat16),
  )
  lengths = jnp.full(BATCH, 8)
  rows, state = jax.eval_shape(
    lambda *args: decoding.start(
      setup, *args, lengths, jnp.arange(BATCH), jax.random.key(0)
    ),
    params,
    tokens,
  )
  return setup, params, rows, state


def test_a_decoding_step_writes_no_dense_kernel(monkeypatch):
  kernels = {IN * OUT, IN * CONFIG.heads * 64, IN * CONFIG.kv_heads * 64}
  ours = compiled('h100', decoding.advance_alone, *step())
  assert ours.as_text().count(CALL) == 7  # of a layer; layers are scanned
  assert not floats(ours) & kernels

  monkeypatch.setattr(choice, 'ROWS', 0)
  theirs = compiled('h100', decoding.advance_alone, *step())
  assert floats(theirs) >= kernels
  scratch = [p.memory_analysis().temp_size_in_bytes for p in (ours, theirs)]
  print(scratch)  # pytest -rP shows it
  assert scratch[0] < scratch[1] / 4
