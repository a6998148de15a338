import dataclasses
import pathlib
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora.checkpoints.bases import DEFAULT_BASE, open_base
from jlora.checkpoints.model_folders import save_folder
from jlora.checkpoints.placement import load_frozen, load_split
from jlora.models import families
from jlora.models.decoder import Decoder
from tests.decoders import make_config, make_params


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


def test_experts_split_as_they_arrive_equal_a_tree_partitioned(
  tiny_base, tmp_path
):
  config = dataclasses.replace(make_config('mixtral'), vocab_size=320)
  tokenizer = open_base(str(tiny_base)).tokenizer
  save_folder(tmp_path / 'moe', config, make_params(config), tokenizer)
  base = open_base(str(tmp_path / 'moe'))
  quant = families.resolve(jlora.QuantSpec(block_size=16), config)
  spec = families.resolve(jlora.LoraSpec(rank=2, variant='dora'), config)
  dense = jax.tree.map(jnp.asarray, base.load_params())
  key = jax.random.key(5)
  found = load_split(key, base, spec, quant, jnp.float32)[:2]
  chex.assert_trees_all_equal(
    found, jlora.partition(key, dense, spec, quant=quant)
  )
  assert 'router' not in found[1]['layers']['mlp']


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
    load_split(key, base, spec, quant, jnp.float32)[:2],
    jlora.partition(key, dense, spec, quant=quant),
  )


def test_what_an_init_leaves_takes_the_dtype_too(tiny_base):
  base = open_base(str(tiny_base))
  spec = jlora.LoraSpec(rank=4, init='pissa', targets='mlp')
  spec = families.resolve(spec, base.config)
  halves = load_split(jax.random.key(0), base, spec, None, jnp.bfloat16)
  frozen, trainable, _ = halves
  assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype('f4')}


@pytest.mark.parametrize('stored', ['float32', 'bfloat16'])
def test_a_sharded_folder_is_loaded_with_its_largest_tensor_in_memory(
  tiny_base, tmp_path, stored
):
  base = open_base(str(tiny_base))
  config = dataclasses.replace(base.config, vocab_size=8192)
  save_folder(
    tmp_path / 'b',
    config,
    make_params(config),
    base.tokenizer,
    stored,
    max_shard_size='300KB',
  )
  base = open_base(str(tmp_path / 'b'))
  assert len(base.model.paths) > 1
  quant = families.resolve(jlora.QuantSpec(), config)
  load_frozen(base, quant, jnp.float32)  # compiles
  tracemalloc.start()
  load_frozen(base, quant, jnp.float32)
  peak = tracemalloc.get_traced_memory()[1]  # XLA's own arrays are not in it
  tracemalloc.stop()
  largest = 8192 * 64 * 4
  assert peak <= 1.2 * largest


@pytest.mark.slow
def test_loftq_starts_with_less_of_a_real_base_lost_to_4_bits():
  base = open_base(DEFAULT_BASE)
  quant = families.resolve(jlora.QuantSpec(), base.config)
  text = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
  ids = base.tokenizer(text, return_tensors='np')['input_ids'][:, :1024]
  apply = jlora.lift(Decoder(base.config).apply)

  def loss(init):
    spec = jlora.LoraSpec(rank=16, alpha=16.0, init=init)
    spec = families.resolve(spec, base.config)
    halves = load_split(jax.random.key(0), base, spec, quant, jnp.float32)[:2]
    logits = apply({'params': jlora.combine(*halves, spec)}, ids)
    losses = optax.softmax_cross_entropy_with_integer_labels
    return float(losses(logits[:, :-1], ids[:, 1:]).mean())

  found = {init: loss(init) for init in ('lora', 'loftq')}
  print(f'loss of the README: {found}')
  assert found['loftq'] < found['lora']
