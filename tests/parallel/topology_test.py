"""The train step, compiled by the GPU compiler for a GPU that is not here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import jlora
from jlora.core.state import TrainState
from jlora.data.batch import Batch
from jlora.errors import ConfigError
from jlora.models import families
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.parallel import topology
from jlora.parallel.mesh import by_example, make_mesh, replicated
from jlora.training.optimizers import OptimSpec, make_optimizer
from jlora.training.step import make_loss, make_step

CONFIG = DecoderConfig(
  vocab_size=4096,
  embed_dim=1024,
  mlp_dim=2816,
  layers=4,
  heads=16,
  kv_heads=4,
  head_dim=64,
)
ROWS, LENGTH = 8, 512


def abstract_step():
  """Returns a QLoRA step's loss, optimizer and abstract arguments."""
  model = Decoder(CONFIG, dtype=jnp.bfloat16, remat='full')
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
  )
  spec = families.resolve(jlora.LoraSpec(rank=16), CONFIG)
  quant = families.resolve(jlora.QuantSpec(), CONFIG)
  frozen, trainable = jlora.partition(
    jax.random.key(0), params, spec, quant=quant
  )
  tx = make_optimizer(OptimSpec(), 100, trainable)
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32),
    trainable,
    jax.eval_shape(tx.init, trainable),
  )
  mask = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)
  batch = Batch(tokens, tokens, mask, tokens, tokens)
  loss = make_loss(model, spec, chunk=512, frozen_head=True)
  return loss, tx, state, frozen, batch


def put(tree, sharding: NamedSharding):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
def test_the_qlora_step_compiles_for_an_h100():
  mesh = make_mesh(devices=topology.gpu_devices('h100'))
  loss, tx, state, frozen, batch = abstract_step()
  step = make_step(loss, tx, mesh)
  traced = step.trace(
    put(state, replicated(mesh)),
    put(frozen, replicated(mesh)),
    put(batch, by_example(mesh)),
  )
  compiled = traced.lower(lowering_platforms=('cuda',)).compile()
  memory = compiled.memory_analysis()
  codes = sum(x.size for x in jax.tree.leaves(frozen) if x.dtype == jnp.uint8)
  dense = 2 * 2 * codes  # bfloat16 bytes of what the codes stand for
  assert memory.argument_size_in_bytes > codes
  saved = CONFIG.layers * ROWS * LENGTH * CONFIG.embed_dim * 2
  # Scratch is a layer's activations, not the decoded stack of kernels.
  print(memory, dense, saved)
  assert memory.temp_size_in_bytes > saved


def test_an_unknown_target_lists_the_known_ones():
  with pytest.raises(ConfigError, match=r"'b7000'.*\['h100'\]"):
    topology.gpu_devices('b7000')
