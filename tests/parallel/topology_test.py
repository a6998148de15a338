"""The train step, compiled by the GPU compiler for a GPU that is not here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import jlora
from jlora.core.state import TrainState
from jlora.core.tree import size_of
from jlora.data.batch import Batch
from jlora.errors import ConfigError
from jlora.models import families
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.parallel import topology
from jlora.parallel.mesh import by_example, make_mesh, replicated
from jlora.training.optimizers import OptimSpec, make_optimizer
from jlora.training.step import make_loss, make_step

ROWS, LENGTH, WIDTH = 8, 512, 1024


def config_of(layers: int) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=4096,
    embed_dim=WIDTH,
    mlp_dim=2816,
    layers=layers,
    heads=16,
    kv_heads=4,
    head_dim=64,
  )


def abstract_step(config: DecoderConfig):
  """Returns a QLoRA step's loss, optimizer and abstract arguments."""
  model = Decoder(config, dtype=jnp.bfloat16, remat='full')
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
  )
  spec = families.resolve(jlora.LoraSpec(rank=16), config)
  quant = families.resolve(jlora.QuantSpec(), config)
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


def compiled_for_h100(layers: int):
  """Returns the compiled step and the bytes of its adapters."""
  mesh = make_mesh(devices=topology.gpu_devices('h100'))
  loss, tx, state, frozen, batch = abstract_step(config_of(layers))
  traced = make_step(loss, tx, mesh).trace(
    put(state, replicated(mesh)),
    put(frozen, replicated(mesh)),
    put(batch, by_example(mesh)),
  )
  compiled = traced.lower(lowering_platforms=('cuda',)).compile()
  return compiled.memory_analysis(), size_of(state.trainable)


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
def test_on_an_h100_scratch_grows_by_layer_inputs_and_adapter_gradients():
  small, small_adapters = compiled_for_h100(4)
  large, large_adapters = compiled_for_h100(8)
  growth = large.temp_size_in_bytes - small.temp_size_in_bytes
  inputs = 4 * ROWS * LENGTH * WIDTH * 2
  gradients = large_adapters - small_adapters
  assert growth <= 1.1 * (inputs + gradients)


def test_an_unknown_target_lists_the_known_ones():
  with pytest.raises(ConfigError, match=r"'b7000'.*\['h100'\]"):
    topology.gpu_devices('b7000')
