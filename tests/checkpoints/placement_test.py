import chex
import jax
import jax.numpy as jnp

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.placement import load_params
from jlora.models import families


def test_leaves_quantized_as_they_arrive_equal_a_tree_quantized(tiny_base):
  base = open_base(str(tiny_base))
  quant = families.resolve(jlora.QuantSpec(), base.config)
  dense = jax.tree.map(jnp.asarray, base.load_params())
  chex.assert_trees_all_equal(
    load_params(base, quant, jnp.float32), jlora.quantize(dense, quant)
  )


def test_dense_leaves_take_the_dtype_and_whole_ones_stay_float32(tiny_base):
  base = open_base(str(tiny_base))
  params = load_params(base, None, jnp.bfloat16, whole=('final_norm/scale',))
  assert params['final_norm']['scale'].dtype == jnp.float32
  assert params['embed']['embedding'].dtype == jnp.bfloat16


def test_codes_compute_in_the_dtype_that_is_asked_for(tiny_base):
  base = open_base(str(tiny_base))
  quant = families.resolve(jlora.QuantSpec(), base.config)
  kernel = load_params(base, quant, jnp.bfloat16)['layers']['mlp']['up_proj']
  assert kernel['kernel'].dtype == jnp.bfloat16
