import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.core.lazy import densify
from jlora.core.plan import Placeholder
from jlora.errors import AdapterError, ConfigError
from jlora.models import families

STACKED = {r'layers/.*': 'layers | in -> out'}


def shapes(tree):
  return jax.tree.map(lambda x: x.shape, tree)


@pytest.fixture(scope='module')
def small():
  """Two stacked layers of one kernel, a norm and a head, in bfloat16."""
  kernel = jax.random.normal(jax.random.key(0), (2, 64, 8), jnp.bfloat16)
  return {
    'layers': {'up': {'kernel': kernel}, 'down': {'kernel': kernel + 1}},
    'norm': {'scale': jnp.ones(64, jnp.bfloat16)},
  }


def make_spec(**fields):
  return jlora.LoraSpec(**({'rank': 4, 'axes': STACKED} | fields))


def test_trainable_mirrors_the_targets(config, params):
  spec = families.resolve(jlora.LoraSpec(rank=3, targets='mlp'), config)
  _, trainable = jlora.partition(jax.random.key(0), params, spec)
  wide, narrow = (
    {'a': (3, 64, 3), 'b': (3, 3, 96)},
    {'a': (3, 96, 3), 'b': (3, 3, 64)},
  )
  assert shapes(trainable) == {
    'layers': {
      'mlp': {
        'gate_proj': {'kernel': wide},
        'up_proj': {'kernel': wide},
        'down_proj': {'kernel': narrow},
      }
    }
  }


def test_a_leaf_trained_whole_leaves_a_placeholder(small):
  spec = make_spec(targets=(), train_full='norm/.*')
  frozen, trainable = jlora.partition(jax.random.key(0), small, spec)
  assert shapes(trainable) == {'norm': {'scale': {'full': (64,)}}}
  assert frozen['norm']['scale'] == Placeholder((64,), jnp.dtype('bfloat16'))
  assert len(jax.tree.leaves(frozen)) == 2


def test_full_fine_tuning_leaves_nothing_frozen(params):
  spec = jlora.LoraSpec(targets=(), train_full='.*')
  frozen, trainable = jlora.partition(jax.random.key(0), params, spec)
  assert jax.tree.leaves(frozen) == []
  merged = jlora.merge(frozen, trainable, spec)
  jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_everything_trained_is_float32(small):
  spec = make_spec(train_full='norm/.*')
  _, trainable = jlora.partition(jax.random.key(0), small, spec)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(trainable)}
  assert dtypes == {jnp.dtype('float32')}


def test_labels_name_every_trained_leaf(small):
  spec = make_spec(targets='layers/up/kernel', train_full='norm/.*')
  _, trainable = jlora.partition(jax.random.key(0), small, spec)
  assert jlora.labels(trainable) == {
    'layers': {'up': {'kernel': {'a': 'a', 'b': 'b'}}},
    'norm': {'scale': {'full': 'full'}},
  }


@pytest.mark.parametrize('quant', [None, jlora.QuantSpec(axes=STACKED)])
def test_a_new_adapter_is_the_base_bit_for_bit(small, quant):
  spec = make_spec(train_full='norm/.*')
  frozen, trainable = jlora.partition(
    jax.random.key(0), small, spec, quant=quant
  )
  base = jlora.dequantize(jlora.quantize(small, quant)) if quant else small
  merged = jlora.merge(frozen, trainable, spec)
  jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_a_is_uniform_within_the_root_of_the_inputs():
  params = {'kernel': jnp.zeros((5, 400, 32))}
  spec = jlora.LoraSpec(rank=16, axes={'.*': 'layers | in -> out'})
  _, trainable = jlora.partition(jax.random.key(0), params, spec)
  a = np.asarray(trainable['kernel']['a']) * 400**0.5
  assert abs(a).max() <= 1
  assert abs(a).max() > 0.999
  # 32,000 draws: within 5 standard errors of the variance of U(-1, 1).
  assert abs(a.var() - 1 / 3) <= 5 * (4 / 45 / a.size) ** 0.5
  assert not np.array_equal(a[0], a[1])


def test_an_adapter_does_not_depend_on_other_targets(small):
  one = make_spec(targets='layers/up/kernel')
  both = make_spec(train_full='norm/.*')
  _, alone = jlora.partition(jax.random.key(5), small, one)
  _, among = jlora.partition(jax.random.key(5), small, both)
  np.testing.assert_array_equal(
    alone['layers']['up']['kernel']['a'], among['layers']['up']['kernel']['a']
  )
  up, down = among['layers']['up'], among['layers']['down']
  assert not np.array_equal(up['kernel']['a'], down['kernel']['a'])


@pytest.mark.parametrize('quant', [None, jlora.QuantSpec(axes=STACKED)])
def test_partition_works_on_shapes_alone(small, quant):
  spec = make_spec(train_full='norm/.*')
  abstract = jax.eval_shape(lambda: small)
  halves = jlora.partition(jax.random.key(0), abstract, spec, quant=quant)
  real = jlora.partition(jax.random.key(0), small, spec, quant=quant)
  leaves = jax.tree.leaves(halves)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert jax.tree.structure(halves) == jax.tree.structure(real)
  assert shapes(halves) == shapes(real)


def test_shapes_of_quantized_kernels_give_shapes():
  abstract = {'kernel': jax.ShapeDtypeStruct((64, 8), jnp.float32)}
  quantized = jax.eval_shape(
    lambda tree: jlora.quantize(tree, jlora.QuantSpec()), abstract
  )
  _, trainable = jlora.partition(
    jax.random.key(0), quantized, jlora.LoraSpec(rank=4)
  )
  assert isinstance(trainable['kernel']['a'], jax.ShapeDtypeStruct)


def test_quantized_parameters_are_taken_as_they_are(small):
  quant = jlora.QuantSpec(axes=STACKED)
  ready = jlora.quantize(small, quant)
  frozen, trainable = jlora.partition(jax.random.key(0), ready, make_spec())
  other, same = jlora.partition(
    jax.random.key(0), small, make_spec(), quant=quant
  )
  jax.tree.map(np.testing.assert_array_equal, frozen, other)
  jax.tree.map(np.testing.assert_array_equal, trainable, same)


def test_merge_adds_the_scaled_product(small, perturb):
  spec = make_spec(rank=4, alpha=6.0, targets='layers/up/kernel')
  frozen, trainable = jlora.partition(jax.random.key(0), small, spec)
  trainable = perturb(trainable)
  node = trainable['layers']['up']['kernel']
  update = 1.5 * np.einsum('lir,lro->lio', node['a'], node['b'])
  kernel = np.asarray(small['layers']['up']['kernel'], np.float32)
  merged = jlora.merge(frozen, trainable, spec, dtype=jnp.float32)
  np.testing.assert_allclose(
    merged['layers']['up']['kernel'], kernel + update, rtol=1e-6, atol=1e-6
  )
  assert merged['norm']['scale'].dtype == jnp.float32


def test_combine_is_shaped_like_the_parameters(small):
  spec = make_spec(targets='layers/up/kernel', train_full='norm/.*')
  frozen, trainable = jlora.partition(jax.random.key(0), small, spec)
  params = jlora.combine(frozen, trainable, spec)
  leaf = params['layers']['up']['kernel']
  assert isinstance(leaf, jlora.LoraArray)
  assert (leaf.shape, leaf.dtype) == ((2, 64, 8), jnp.bfloat16)
  assert params['layers']['down'] is not None
  assert params['norm']['scale'].dtype == jnp.bfloat16


def test_every_layer_and_leaf_draws_its_own_dropout(small):
  spec = make_spec(dropout=0.5)
  frozen, trainable = jlora.partition(jax.random.key(0), small, spec)
  params = jlora.combine(frozen, trainable, spec, key=jax.random.key(1))
  nodes = [params['layers'][name]['kernel'] for name in ('up', 'down')]
  keys = np.concatenate([jax.random.key_data(node.key) for node in nodes])
  assert len(np.unique(keys, axis=0)) == 4


@pytest.mark.parametrize('spec', [make_spec(), make_spec(dropout=0.5)])
def test_no_key_or_no_dropout_means_no_keys(small, spec):
  frozen, trainable = jlora.partition(jax.random.key(0), small, spec)
  key = None if spec.dropout else jax.random.key(0)
  params = jlora.combine(frozen, trainable, spec, key=key)
  assert params['layers']['up']['kernel'].key is None


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rank': 9}, "rank 9 exceeds what 'layers/.*at most 8"),
    ({'targets': 'layers/side/kernel'}, "'layers/side/kernel' matches none"),
    ({'targets': 'norm/scale'}, 'is no kernel'),
    ({'targets': ()}, 'nothing is trained'),
    ({'exclude': '.*'}, 'nothing is trained'),
    ({'train_full': 'layers/up/.*'}, 'by targets and by train_full'),
    ({'axes': ()}, 'has 3 axes'),
  ],
)
def test_a_spec_that_does_not_fit_is_refused(small, fields, message):
  with pytest.raises(ConfigError, match=message):
    jlora.partition(jax.random.key(0), small, make_spec(**fields))


def test_a_quantized_leaf_is_not_trained_whole(small):
  ready = jlora.quantize(small, jlora.QuantSpec(axes=STACKED))
  spec = make_spec(targets=(), train_full='layers/up/kernel')
  with pytest.raises(ConfigError, match='is quantized and cannot be trained'):
    jlora.partition(jax.random.key(0), ready, spec)


def test_a_kernel_of_whole_numbers_takes_no_adapter():
  params = {'kernel': jnp.ones((8, 8), jnp.int32)}
  with pytest.raises(ConfigError, match='int32 cannot take an adapter'):
    jlora.partition(jax.random.key(0), params, jlora.LoraSpec(rank=2))


@pytest.mark.parametrize('missing', [True, False])
def test_halves_that_do_not_belong_together_are_refused(small, missing):
  wide, narrow = make_spec(), make_spec(targets='layers/up/kernel')
  made, used = (narrow, wide) if missing else (wide, narrow)
  frozen, trainable = jlora.partition(jax.random.key(0), small, made)
  with pytest.raises(AdapterError, match='layers/down/kernel'):
    jlora.combine(frozen, trainable, used)


@pytest.mark.parametrize('quant', [None, jlora.QuantSpec(axes=STACKED)])
def test_dora_starts_at_the_base_with_the_lengths_of_its_columns(small, quant):
  spec = make_spec(variant='dora')
  frozen, trainable = jlora.partition(
    jax.random.key(0), small, spec, quant=quant
  )
  node = trainable['layers']['up']['kernel']
  base = densify(frozen['layers']['up']['kernel'], jnp.float32)
  lengths = np.linalg.norm(base, axis=1)
  np.testing.assert_allclose(node['magnitude'], lengths, rtol=1e-5)
  merged = jlora.merge(frozen, trainable, spec, dtype=jnp.float32)
  np.testing.assert_allclose(
    merged['layers']['up']['kernel'], base, rtol=1e-5, atol=1e-6
  )


def test_trained_rows_start_as_those_of_the_table():
  params = {
    'embed': {'embedding': jax.random.normal(jax.random.key(0), (12, 8))},
    'head': {'kernel': jax.random.normal(jax.random.key(1), (8, 12))},
  }
  spec = jlora.LoraSpec(
    targets=(),
    axes={'head/kernel': 'embed -> vocab'},
    train_rows={'.*': (3, 7)},
  )
  frozen, trainable = jlora.partition(jax.random.key(0), params, spec)
  np.testing.assert_array_equal(
    trainable['embed']['embedding']['rows'],
    params['embed']['embedding'][jnp.array([3, 7])],
  )
  np.testing.assert_array_equal(
    trainable['head']['kernel']['rows'],
    params['head']['kernel'][:, jnp.array([3, 7])].T,
  )
  merged = jlora.merge(frozen, trainable, spec)
  jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_padding_stays_zero_and_layers_that_are_not_chosen_stay_the_base():
  kernel = jax.random.normal(jax.random.key(0), (3, 8, 8))
  spec = jlora.LoraSpec(
    rank=4,
    targets=('k', 'k/[12]'),
    exclude='k/0',
    variant='dora',
    axes={'k': 'layers | in -> out'},
    rank_pattern={'k/1': 2},
  )
  frozen, trainable = jlora.partition(jax.random.key(0), {'k': kernel}, spec)
  x = jax.random.normal(jax.random.key(1), (5, 8))

  def loss(trainable):
    params = jlora.combine(frozen, trainable, spec)
    scan = jlora.lift(
      lambda w, x: jax.lax.scan(lambda h, k: (h @ k, None), x, w)[0]
    )
    return jnp.square(scan(params['k'], x) - 1).mean()

  tx = optax.adamw(1e-2, weight_decay=0.1)
  state = tx.init(trainable)
  for _ in range(3):
    updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
    trainable = optax.apply_updates(trainable, updates)
  a, b = trainable['k']['a'], trainable['k']['b']
  for padding in (a[0], b[0], a[1, :, 2:], b[1, 2:]):
    assert not np.any(padding)
  assert np.all(np.any(b[2], axis=1))
  merged = jlora.merge(frozen, trainable, spec)['k']
  np.testing.assert_array_equal(merged[0], kernel[0])
  assert not np.allclose(merged[1], kernel[1])


@pytest.mark.parametrize(
  ('init', 'quantized'),
  [
    ('pissa', False),
    ('pissa', True),
    ('olora', False),
    ('olora', True),
    ('loftq', True),
  ],
)
def test_an_init_that_changes_the_base_keeps_the_function(init, quantized):
  layout = 'layers out in: layers | in -> out'
  kernel = jax.random.normal(jax.random.key(0), (2, 24, 64), jnp.bfloat16)
  spec = jlora.LoraSpec(rank=8, alpha=8.0, init=init, axes={'.*': layout})
  quant = jlora.QuantSpec(axes={'.*': layout}) if quantized else None
  frozen, trainable = jlora.partition(
    jax.random.key(0), {'kernel': kernel}, spec, quant=quant
  )
  assert (frozen['kernel'].shape, frozen['kernel'].dtype) == (
    kernel.shape,
    kernel.dtype,
  )
  merged = jlora.merge(frozen, trainable, spec, dtype=jnp.float32)['kernel']
  wide = np.asarray(kernel, np.float32)
  error = np.linalg.norm(merged - wide) / np.linalg.norm(wide)
  if not quantized:  # the residual is rounded to bfloat16, once
    assert error <= 2**-8
  elif init != 'olora':  # see initializers_test for its gate
    plain = jlora.dequantize(jlora.quantize({'kernel': kernel}, quant))
    nf4 = np.asarray(plain['kernel'], np.float32)
    assert error < np.linalg.norm(nf4 - wide) / np.linalg.norm(wide)


def test_an_init_that_changes_the_base_needs_the_dense_kernel(small):
  ready = jlora.quantize(small, jlora.QuantSpec(axes=STACKED))
  with pytest.raises(
    ConfigError, match=r"'pissa' takes a part out .*quantized"
  ):
    jlora.partition(jax.random.key(0), ready, make_spec(init='pissa'))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'init': 'loftq'}, "'layers/down/kernel' is not quantized"),
    ({'init': 'pissa', 'targets': (), 'train_full': '.*'}, 'no kernel has one'),
  ],
)
def test_an_init_without_what_it_starts_from_is_refused(small, fields, message):
  with pytest.raises(ConfigError, match=message):
    jlora.partition(jax.random.key(0), small, make_spec(**fields))


def test_leaves_that_are_no_arrays_are_left_alone(small):
  params = {**small, 'activation': jax.nn.relu, 'name': 'foreign', 'none': None}
  frozen, trainable = jlora.partition(jax.random.key(0), params, make_spec())
  merged = jlora.merge(frozen, trainable, make_spec())
  assert merged['activation'] is jax.nn.relu
  assert merged['name'] == 'foreign'


def test_the_frozen_half_alone_says_that_a_leaf_is_in_the_other(small):
  spec = make_spec(train_full='norm/.*')
  frozen, _ = jlora.partition(jax.random.key(0), small, spec)
  with pytest.raises(TypeError, match=r'put both halves .*jlora\.combine'):
    jnp.sin(frozen['norm']['scale'])


def test_an_adapter_that_does_not_fit_its_kernel_is_refused(small):
  spec = make_spec(rank=4)
  frozen, trainable = jlora.partition(jax.random.key(0), small, spec)
  with pytest.raises(AdapterError, match=r"at 'layers/down/kernel'; kern"):
    jlora.combine(frozen, trainable, make_spec(rank=5))
  with pytest.raises(AdapterError, match='magnitude'):
    jlora.combine(frozen, trainable, make_spec(rank=4, variant='dora'))


def test_other_roles_for_the_codes_than_for_the_adapter_are_refused():
  params = {'kernel': jnp.ones((8, 8, 8))}
  quant = jlora.QuantSpec(axes={'kernel': 'layers | in -> out'}, block_size=4)
  spec = jlora.LoraSpec(rank=2, axes={'kernel': 'in -> heads head_dim'})
  frozen, trainable = jlora.partition(
    jax.random.key(0), params, spec, quant=quant
  )
  with pytest.raises(AdapterError, match='quantized with other axis roles'):
    jlora.combine(frozen, trainable, spec)
