"""The `gemma` package's Linen transformers, as they are."""

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.foreign

TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 1, 48)
SIZES = {
  'num_embed': 48,
  'embed_dim': 16,
  'hidden_dim': 24,
  'num_heads': 4,
  'head_dim': 8,
  'use_post_attn_norm': True,
  'use_post_ffw_norm': True,
  'sliding_window_size': 4,
}
HEADS_FIRST = 'out in out_1: in -> out out_1'
PAIR_FIRST = 'out out_1 in out_2: in -> out out_1 out_2'
# What members of the family differ in: their fields, and roles of kernels.
MEMBERS = {
  'one kv head': (
    {'num_kv_heads': 1, 'use_qk_norm': True, 'final_logit_softcap': None},
    {
      'attn/q_einsum/w': HEADS_FIRST,
      'attn/kv_einsum/w': PAIR_FIRST,
      'mlp/gating_einsum': HEADS_FIRST,
    },
  ),
  'gate [out, in]': (
    {
      'num_kv_heads': 2,
      'final_logit_softcap': 30.0,
      'attn_logits_soft_cap': 50.0,
      'transpose_gating_einsum': True,
    },
    {
      'attn/q_einsum/w': HEADS_FIRST,
      'attn/kv_einsum/w': PAIR_FIRST,
      'mlp/gating_einsum': 'out out_1 in: in -> out out_1',
    },
  ),
  'q, k and v in one': (
    {'num_kv_heads': 4, 'final_logit_softcap': None},
    {'attn/qkv_einsum/w': PAIR_FIRST, 'mlp/gating_einsum': HEADS_FIRST},
  ),
}


@pytest.fixture(scope='module', params=MEMBERS)
def member(request):
  return MEMBERS[request.param]


@pytest.fixture(scope='module')
def tuned(member, tune, cross_entropy):
  from gemma import gm

  kinds = gm.nn.AttentionType
  config = gm.nn.config.TransformerConfig(
    attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL), **SIZES, **member[0]
  )
  model = gm.nn.Transformer(config=config, dtype=jnp.float32)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)['params']

  def loss(params, tokens):
    return cross_entropy(model.apply({'params': params}, tokens).logits, tokens)

  return tune(loss, params, TOKENS)


def test_three_steps_lower_the_loss(tuned):
  assert tuned.losses == sorted(set(tuned.losses), reverse=True)


def test_lifted_equals_merged(tuned, assert_lifted_equals_merged):
  assert_lifted_equals_merged(tuned, TOKENS)


def test_every_kernel_is_in_4_bits(tuned, assert_kernels_are_in_4_bits):
  assert_kernels_are_in_4_bits(tuned)


def test_every_kernel_is_found(tuned, member, roles):
  layer = {
    'attn/attn_vec_einsum/w': 'in in_1 -> out',
    'mlp/linear': 'in -> out',
    **member[1],
  }
  assert roles(tuned.spec) == {
    'embedder/input_embedding': 'vocab -> embed',
    **{f'layer_0/{name}': text for name, text in layer.items()},
    **{f'layer_1/{name}': text for name, text in layer.items()},
  }
