"""NNX transformers of `google-tunix`, as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytestmark = [
  pytest.mark.foreign,
  # The package uses what JAX and Flax are about to drop.
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
]

TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 1, 48)
SIZES = {
  'num_layers': 2,
  'vocab_size': 48,
  'embed_dim': 16,
  'hidden_dim': 24,
  'num_heads': 4,
  'head_dim': 4,
  'num_kv_heads': 2,
  'rope_theta': 10_000,
  'norm_eps': 1e-5,
}
HEADS = {
  'attn/q_proj/w': 'in -> out out_1',
  'attn/k_proj/w': 'in -> out out_1',
  'attn/v_proj/w': 'in -> out out_1',
  'attn/o_proj/w': 'in in_1 -> out',
}
MLP = ('gate_proj', 'up_proj', 'down_proj')


def llama():
  """Its output head is the embedding; layers are rematerialized."""
  from tunix.models.llama3 import model as llama3

  config = llama3.ModelConfig(
    **SIZES, weight_tying=True, remat_config=llama3.RematConfig.DECODER
  )
  return llama3.Llama3(config, rngs=nnx.Rngs(0))


def qwen():
  """Its MLPs are experts, two of which see each token."""
  from tunix.models.qwen3 import model as qwen3

  config = qwen3.ModelConfig(**SIZES, num_experts=3, num_experts_per_tok=2)
  return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def with_noise(params):
  """Adds noise, for kernels that the package starts at zero."""
  random = np.random.default_rng(0)

  def add(x):
    return x + jnp.asarray(0.1 * random.standard_normal(x.shape), x.dtype)

  return jax.tree.map(add, params)


@pytest.fixture(scope='module', autouse=True)
def their_broadcasts():
  with jax.numpy_rank_promotion('allow'):
    yield


# Roles of a layer's kernels, and of those beside the layers.
MEMBERS = {
  llama: ({f'mlp/{name}/kernel': 'in -> out' for name in MLP}, {}),
  qwen: (
    {
      'mlp/router/kernel': 'in -> out',
      **{f'mlp/{name}': 'layers | in -> out' for name in MLP},
    },
    {'lm_head/w': 'in -> out'},
  ),
}


@pytest.fixture(scope='module', params=MEMBERS)
def make(request):
  return request.param


@pytest.fixture(scope='module')
def tuned(make, tune, cross_entropy):
  graphdef, state, rest = nnx.split(make(), nnx.Param, ...)
  params = with_noise(nnx.to_pure_dict(state))

  def loss(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    causal = jnp.broadcast_to(jnp.tri(8, dtype=bool), (2, 8, 8))
    model = nnx.merge(graphdef, params, rest)
    logits, _ = model(tokens, positions, None, causal)
    return cross_entropy(logits, tokens)

  return tune(loss, params, TOKENS)


def test_three_steps_lower_the_loss(tuned):
  assert tuned.losses == sorted(set(tuned.losses), reverse=True)


def test_lifted_equals_merged(tuned, assert_lifted_equals_merged):
  assert_lifted_equals_merged(tuned, TOKENS)


def test_every_kernel_is_in_4_bits(tuned, assert_kernels_are_in_4_bits):
  assert_kernels_are_in_4_bits(tuned)


def test_every_kernel_is_found(make, tuned, roles):
  mlp, others = MEMBERS[make]
  layer = {**HEADS, **mlp}
  assert roles(tuned.spec) == {
    'embedder/input_embedding': 'vocab -> embed',
    **{f'layers/0/{name}': text for name, text in layer.items()},
    **{f'layers/1/{name}': text for name, text in layer.items()},
    **others,
  }
