import chex
import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.placement import load_frozen, load_halves
from jlora.models import families


def test_leaves_quantized_as_they_arrive_equal_a_tree_quantized(tiny_base):
  base = open_base(str(tiny_base))
  quant = families.resolve(jlora.QuantSpec(), base.config)
  dense = jax.tree.map(jnp.asarray, base.load_params())
  chex.assert_trees_all_equal(
    load_frozen(base, quant, jnp.float32), jlora.quantize(dense, quant)
  )


def test_dense_leaves_take_the_dtype_and_whole_ones_stay_float32(tiny_base):
  base = open_base(str(tiny_base))
  params = load_frozen(base, None, jnp.bfloat16, whole=('final_norm/scale',))
  assert params['final_norm']['scale'].dtype == jnp.float32
  assert params['embed']['embedding'].dtype == jnp.bfloat16


def test_codes_compute_in_the_dtype_that_is_asked_for(tiny_base):
  base = open_base(str(tiny_base))
  quant = families.resolve(jlora.QuantSpec(), base.config)
  kernel = load_frozen(base, quant, jnp.bfloat16)['layers']['mlp']['up_proj']
  assert kernel['kernel'].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  'fields',
  [
    {'variant': 'dora', 'train_full': '.*/scale'},
    {'init': 'pissa', 'targets': 'mlp'},
    {'init': 'loftq', 'targets': 'attention'},
    {'train_rows': {'embed/embedding': [3, 5]}},
  ],
  ids=['dora', 'pissa', 'loftq', 'rows'],
)
def test_halves_split_as_leaves_arrive_equal_a_tree_partitioned(
  tiny_base, fields
):
  base = open_base(str(tiny_base))
  quant = families.resolve(jlora.QuantSpec(), base.config)
  spec = families.resolve(jlora.LoraSpec(rank=4, **fields), base.config)
  dense = jax.tree.map(jnp.asarray, base.load_params())
  key = jax.random.key(5)
  chex.assert_trees_all_equal(
    load_halves(key, base, spec, quant, jnp.float32),
    jlora.partition(key, dense, spec, quant=quant),
  )


def test_what_an_init_leaves_takes_the_dtype_too(tiny_base):
  base = open_base(str(tiny_base))
  spec = jlora.LoraSpec(rank=4, init='pissa', targets='mlp')
  spec = families.resolve(spec, base.config)
  halves = load_halves(jax.random.key(0), base, spec, None, jnp.bfloat16)
  frozen, trainable = halves
  assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype('f4')}
