"""Facts of jlora.parallel.shardings; the mesh is abstract, so any size goes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import jlora
from jlora.core import tree
from jlora.core.plan import is_frozen_leaf
from jlora.errors import ConfigError
from jlora.models import families, layout
from jlora.parallel.mesh import AXES
from jlora.parallel.rules import place
from jlora.parallel.shardings import make_shardings
from jlora.training import adam_8bit

UP = (None, 'fsdp', 'tensor')


def mesh(*sizes):
  return AbstractMesh(sizes, AXES)


def kernel(*shape, block=None):
  """The shapes of a kernel [layers, in, out], in 4 bits with a block size."""
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  if block is None:
    return leaf
  spec = jlora.QuantSpec(block_size=block, axes={'.*': 'layers | in -> out'})
  return jlora.quantize({'kernel': leaf}, spec)['kernel']


@pytest.mark.parametrize(
  ('leaf', 'sizes', 'cuts'),
  [
    (kernel(3, 64, 96), (1, 4, 2), ((), ('fsdp',), ('tensor',))),
    (kernel(3, 64, 96), (8, 1, 1), ((), (), ())),
    (kernel(3, 62, 96), (1, 4, 2), ((), (), ('fsdp', 'tensor'))),
    (kernel(3, 62, 90), (1, 4, 2), ((), (), ('tensor',))),
    (kernel(3, 64, 91), (1, 4, 2), ((), ('fsdp', 'tensor'), ())),
    (kernel(30, 576, 1536, block=64), (1, 8, 1), ((), (), ('fsdp',))),
    (kernel(30, 576, 1536, block=64), (1, 3, 2), ((), ('fsdp',), ('tensor',))),
    (kernel(2, 100, 64, block=32), (1, 4, 1), ((), ('fsdp',), ())),
  ],
)
def test_a_mesh_axis_moves_where_there_are_equal_parts(leaf, sizes, cuts):
  placement = place('up/kernel', leaf, UP, mesh(*sizes))
  assert placement.cuts == cuts
  followed = ((), ('fsdp',), ('tensor',)), ((), ('fsdp',), ()), ((), (), ())
  assert bool(placement.note) == (cuts not in followed)


def test_the_width_of_an_embedding_takes_nothing_over():
  leaf = jax.ShapeDtypeStruct((163, 72), jnp.float32)
  names = (('tensor', 'fsdp'), None)
  placement = place('embed/embedding', leaf, names, mesh(1, 4, 2))
  assert placement.cuts == ((), ())
  assert placement.note == (
    'tensor (163 parts on axis 0) does not cut it;'
    ' fsdp (163 parts on axis 0) does not cut it'
  )


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ((('b/.*', ()),), "no sharding rule matches 'a/kernel'"),
    ((('.*', ('fsdp',)),), "for 1 axes, and 'a/kernel' has 3"),
    (
      (('.*', (None, 'expert', None)),),
      "names 'expert', and the mesh has data",
    ),
  ],
)
def test_a_rule_that_does_not_fit_is_refused(rules, message):
  with pytest.raises(ConfigError, match=message):
    make_shardings({'a/kernel': kernel(2, 4, 4)}, rules, mesh(1, 2, 1))


@pytest.fixture(scope='module')
def halves(sizes):
  config = sizes['tiny']
  spec = jlora.LoraSpec(rank=4, variant='dora', train_full='final_norm/scale')
  return jlora.partition(
    jax.random.key(0),
    tree.nest(layout.shapes(config)),
    families.resolve(spec, config),
    quant=families.resolve(jlora.QuantSpec(block_size=16), config),
  )


@pytest.fixture(scope='module')
def shardings(halves):
  leaves = tree.arrays_by_path(halves[0], is_frozen_leaf)
  return make_shardings(leaves, families.SHARDING, mesh(1, 2, 2))


def specs(node):
  return jax.tree.map(lambda x: x.spec, node)


def test_codes_and_scales_are_cut_as_their_kernel(halves, shardings):
  mlp = shardings.frozen(halves[0])['layers']['mlp']
  codes = PartitionSpec(None, ('tensor',), ('fsdp',))
  down = mlp['down_proj']['kernel']
  assert down.codes.spec == down.scales.spec == codes
  assert down.scales2.spec == down.offset.spec == PartitionSpec(None)


def test_adapters_are_cut_as_the_axis_they_stand_on(halves, shardings):
  found = specs(shardings.trainable(halves[1]))
  assert found['layers']['mlp']['down_proj']['kernel'] == {
    'a': PartitionSpec(None, ('tensor',), None),
    'b': PartitionSpec(None, None, ('fsdp',)),
    'magnitude': PartitionSpec(None, ('fsdp',)),
  }
  assert found['final_norm']['scale']['full'] == PartitionSpec(None)


def test_moments_lie_where_their_weights_do(halves, shardings):
  labels = jlora.labels(halves[1])
  groups = {name: optax.adam(1e-3) for name in set(jax.tree.leaves(labels))}
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.partition(groups, labels)
  )
  opt_state = jax.eval_shape(tx.init, halves[1])
  step = jax.ShapeDtypeStruct((), jnp.int32)
  state = jlora.TrainState(step, halves[1], opt_state)
  placed = shardings.state(state)
  of_weights = specs(tree.leaves_by_path(placed.trainable))
  found = specs(tree.leaves_by_path(placed.opt_state))
  moments = {path: spec for path, spec in found.items() if '/mu/' in path}
  assert len(moments) == len(of_weights)
  for path, spec in moments.items():
    assert spec == of_weights[path.partition('/mu/')[2]]
  counts = [spec for path, spec in found.items() if path.endswith('count')]
  assert set(counts) == {PartitionSpec()}


def test_codes_of_moments_lie_where_their_weights_do(
  halves, shardings, monkeypatch
):
  monkeypatch.setattr(adam_8bit, 'SMALLEST', 1)
  tx = adam_8bit.scale_by_adam_8bit()
  step = jax.ShapeDtypeStruct((), jnp.int32)
  state = jlora.TrainState(step, halves[1], jax.eval_shape(tx.init, halves[1]))
  placed = shardings.state(state)
  assert {x.dtype for x in jax.tree.leaves(state.opt_state.mu)} == {
    jnp.dtype('uint8')
  }
  assert specs(placed.opt_state.mu) == specs(placed.trainable)


def test_every_leaf_of_the_family_has_a_line_in_the_table(halves, shardings):
  rows = dict(shardings.rows())
  assert rows.keys() == tree.arrays_by_path(halves[0], is_frozen_leaf).keys()
  assert rows['layers/mlp/up_proj/kernel'] == '2 × 64/fsdp × 96/tensor'
  assert shardings.title() == (
    'parameters over 4 devices: data 1, fsdp 2, tensor 2'
  )
