"""Facts of jlora.parallel.topology, and of a step compiled through it."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax._src import xla_bridge
from jax.sharding import NamedSharding

import jlora
from jlora.core.state import TrainState
from jlora.core.tree import size_of
from jlora.data.batch import Batch
from jlora.errors import ConfigError, MissingCompilerError
from jlora.models import families
from jlora.models.blockwise import attend_blockwise
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.models.kernels import Attend, make_attend
from jlora.parallel import topology
from jlora.parallel.machines import find_machine, specified
from jlora.parallel.mesh import by_example, make_mesh, replicated
from jlora.training.optimizers import OptimSpec, make_optimizer
from jlora.training.step import make_loss, make_step

PRIVATE = (
  '_discover_and_register_pjrt_plugins',
  '_topology_factories',
  'register_plugin',
)
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


def abstract_step(config: DecoderConfig, attend: Attend):
  """Returns a QLoRA step's loss, optimizer and abstract arguments."""
  model = Decoder(config, dtype=jnp.bfloat16, remat='full', attend=attend)
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


def compiled_for_h100(layers: int, tiled: bool):
  """Returns the compiled step and the bytes of its adapters."""
  mesh = make_mesh(devices=topology.devices_of(find_machine('h100')))
  attend = attend_blockwise if tiled else make_attend(mesh)
  loss, tx, state, frozen, batch = abstract_step(config_of(layers), attend)
  traced = make_step(loss, tx, mesh).trace(
    put(state, replicated(mesh)),
    put(frozen, replicated(mesh)),
    put(batch, by_example(mesh)),
  )
  compiled = traced.lower(lowering_platforms=('cuda',)).compile()
  return compiled.memory_analysis(), size_of(state.trainable)


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  # In tiles it is even from eight layers on; four take 4 MB less than that.
  ('tiled', 'layers'),
  [(False, 4), (True, 8)],
  ids=['by a kernel', 'in tiles'],
)
def test_on_an_h100_scratch_grows_by_layer_inputs_and_adapter_gradients(
  tiled, layers
):
  small, small_adapters = compiled_for_h100(layers, tiled)
  large, large_adapters = compiled_for_h100(layers + 4, tiled)
  growth = large.temp_size_in_bytes - small.temp_size_in_bytes
  inputs = 4 * ROWS * LENGTH * WIDTH * 2
  gradients = large_adapters - small_adapters
  assert growth <= 1.01 * (inputs + gradients)


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [*specified(), 'rtx4090', 'v5e-1', 'v5p-4'])
def test_every_kind_of_machine_compiles(name):
  machine = find_machine(name)
  devices = topology.devices_of(machine)
  assert len(devices) == machine.devices
  whole = replicated(make_mesh(devices=devices))
  x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=whole)
  traced = jax.jit(lambda x: jnp.tanh(x @ x)).trace(x)
  compiled = traced.lower(lowering_platforms=(machine.platform,)).compile()
  memory = compiled.memory_analysis()
  assert memory.argument_size_in_bytes == 256 * 256 * 2


def test_the_cpu_is_here():
  assert list(topology.devices_of(find_machine('cpu'))) == jax.devices()[:1]


def test_more_cpu_devices_than_there_are_are_refused():
  with pytest.raises(ConfigError, match='device_count=999'):
    topology.devices_of(find_machine('cpu-999'))


@pytest.mark.parametrize(
  ('target', 'extra'), [('v5e-8', 'tpu'), ('h100', 'cuda13')]
)
def test_a_missing_compiler_names_its_extra(monkeypatch, target, extra):
  machine = find_machine(target)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(pathlib.Path, 'glob', lambda *_: iter(()))
  monkeypatch.setattr(xla_bridge, '_topology_factories', {})
  monkeypatch.setattr(xla_bridge, PRIVATE[0], lambda: None)
  with pytest.raises(MissingCompilerError, match=rf'\[{extra}\]'):
    topology.devices_of(machine)


def test_what_is_private_in_jax_is_still_there():
  """If this fails, `topology._register_cuda` has to follow a change of jax."""
  for name in PRIVATE:
    assert hasattr(xla_bridge, name), name


@pytest.mark.parametrize('name', PRIVATE)
def test_a_change_of_jax_is_named(monkeypatch, name):
  monkeypatch.delattr(xla_bridge, name)
  with pytest.raises(MissingCompilerError, match=rf'{name}.*topology.py'):
    topology.devices_of(find_machine('h100'))
