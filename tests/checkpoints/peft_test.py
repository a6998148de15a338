"""Adapter files against PEFT itself, on a tiny Llama with random weights."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints import adapters
from jlora.checkpoints.peft import load_adapter
from jlora.core import tree
from jlora.errors import AdapterError
from jlora.models import layout
from jlora.models.decoder import Decoder
from tests.decoders import make_oracle

# transformers warns of its own deprecated names when PEFT asks for them.
pytestmark = pytest.mark.filterwarnings('ignore:.*is deprecated:FutureWarning')

TOKENS = jnp.arange(14).reshape(2, 7)


def merge(params, trainable, spec):
  """Returns the weights of the adapted model."""
  params = jax.tree.map(jnp.asarray, params)
  spec = dataclasses.replace(spec, init='lora')  # params are what was frozen
  frozen, _ = jlora.partition(jax.random.key(0), params, spec)
  return jlora.merge(frozen, trainable, spec)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params):
  return Decoder(config).apply({'params': params}, TOKENS)


def logits_of(config, params):
  return np.asarray(apply(config, params))


def torch_logits(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model(torch.tensor(np.asarray(TOKENS))).logits.numpy()


def assert_close(found, expected):
  # float32 over five products of at most 24 terms: about 2e-6.
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


RANKS = {
  'rank_pattern': {'layers/1/.*': 2, '.*/v_proj/kernel': 3, 'embed/.*': 1},
  'alpha_pattern': {'layers/2/mlp/.*': 3.0, '.*/q_proj/.*': 1.5},
  'targets': ('.*_proj/kernel', 'embed/embedding'),
}
EMBEDDING = {'targets': ('embed/embedding', 'layers/.*/up_proj/kernel')}


@pytest.mark.parametrize(
  ('tied', 'fields'),
  [
    (True, {}),
    (True, {'targets': 'all-linear'}),
    (False, {'targets': ('lm_head/kernel', '.*_proj/kernel')}),
    (True, {'train_full': ('embed/embedding', '.*norm/scale')}),
    (False, {'train_full': ('embed/embedding', 'lm_head/kernel')}),
    (True, {'train_full': ('final_norm/scale', '.*/o_proj/kernel')}),
    (True, {'targets': ('layers/[02]/.*_proj/kernel',)}),
    (True, {'exclude': ('layers/1/mlp/.*', '.*/v_proj/kernel')}),
    (True, RANKS),
    (False, {**RANKS, 'scaling': 'rslora', 'variant': 'dora'}),
    (True, {'variant': 'dora', 'targets': 'all-linear'}),
    (False, {**EMBEDDING, 'variant': 'dora'}),
    (False, EMBEDDING),
    (True, EMBEDDING),
    (True, {**RANKS, 'scaling': 'rslora'}),
    (True, {'train_rows': {'embed/embedding': (3, 5)}}),
    (False, {'train_rows': {'embed/embedding': (3, 5)}}),
    (False, {'train_rows': {'.*embedding': (3, 5), 'lm_head/.*': (5, 7)}}),
  ],
)
def test_peft_computes_the_merged_logits(make_adapted, tmp_path, tied, fields):
  peft = pytest.importorskip('peft')
  adapted = make_adapted(tied, **fields)
  adapted.save(tmp_path / 'adapter')
  base = make_oracle(adapted.config, adapted.params)
  model = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter')
  merged = merge(adapted.params, adapted.trainable, adapted.spec)
  expected = logits_of(adapted.config, merged)
  unadapted = logits_of(adapted.config, adapted.params)
  assert np.abs(expected - unadapted).max() > 0.1
  assert_close(torch_logits(model.eval()), expected)


@pytest.mark.parametrize(
  ('tied', 'fields'),
  [
    (True, {'target_modules': ['q_proj', 'up_proj']}),
    (True, {'target_modules': 'all-linear'}),
    (True, {'target_modules': r'.*\.(k_proj|down_proj)'}),
    (True, {'target_modules': ['v_proj'], 'use_rslora': True}),
    (False, {'target_modules': ['lm_head', 'self_attn.o_proj']}),
    (True, {'target_modules': ['q_proj'], 'layers_to_transform': [0, 1, 2]}),
    (
      True,
      {'target_modules': 'all-linear', 'exclude_modules': ['gate_proj']},
    ),
    (True, {'target_modules': ['q_proj'], 'modules_to_save': ['norm']}),
    (False, {'target_modules': ['q_proj'], 'modules_to_save': ['lm_head']}),
    (
      True,
      {
        'target_modules': 'all-linear',
        'modules_to_save': ['mlp', 'embed_tokens'],
        'ensure_weight_tying': True,
      },
    ),
    (True, {'target_modules': ['q_proj'], 'layers_to_transform': [0, 2]}),
    (
      True,
      {
        'target_modules': ['o_proj', 'model.layers.1.mlp.up_proj'],
        'layers_to_transform': 2,
        'layers_pattern': 'layers',
      },
    ),
    (
      True,
      {
        'target_modules': 'all-linear',
        'rank_pattern': {'^model.layers.1.mlp.up_proj': 2, 'v_proj': 3},
        # PEFT saves patterns sorted, and the first that matches counts.
        'alpha_pattern': {'.*k_proj': 2.5, r'layers\.2\..*': 3},
        'use_rslora': True,
      },
    ),
    (True, {'target_modules': 'all-linear', 'use_dora': True}),
    (
      True,
      {
        'target_modules': ['v_proj'],
        'layers_to_transform': [1],
        'use_dora': True,
        'use_rslora': True,
      },
    ),
    (False, {'target_modules': ['embed_tokens', 'lm_head', 'q_proj']}),
    (False, {'target_modules': ['embed_tokens'], 'use_dora': True}),
    (True, {'target_modules': ['q_proj'], 'trainable_token_indices': [7, 3]}),
    (False, {'target_modules': ['q_proj'], 'trainable_token_indices': [7, 3]}),
    (
      False,
      {
        'target_modules': ['q_proj'],
        'trainable_token_indices': {'embed_tokens': [9, 2], 'lm_head': [5]},
      },
    ),
    (True, {'target_modules': ['q_proj'], 'init_lora_weights': 'gaussian'}),
    (False, {'target_modules': ['q_proj'], 'init_lora_weights': False}),
  ],
)
def test_an_adapter_from_peft_gives_the_model_it_is_there(
  make_adapted, tmp_path, tied, fields
):
  adapted = make_adapted(tied)
  model = make_peft_model(adapted, **fields)
  model.save_pretrained(tmp_path, save_embedding_layers=False)
  adapter = load_adapter(tmp_path, adapted.config)
  assert adapter.metadata == {}
  merged = merge(adapted.params, adapter.trainable, adapter.spec)
  assert_close(torch_logits(model), logits_of(adapted.config, merged))
  leaves = tree.leaves_by_path(merged)
  found = model.merge_and_unload().state_dict()
  for weight in layout.weights(adapted.config):
    arrays = leaves[weight.path] if weight.stacked else [leaves[weight.path]]
    for module, array in zip(weight.modules, arrays, strict=True):
      expected = array.T if weight.transposed else array
      assert_close(found[f'{module}.weight'].numpy(), np.asarray(expected))


def test_a_tied_embedding_of_peft_moves_the_head_too(make_adapted, tmp_path):
  adapted = make_adapted(tied=True)
  model = make_peft_model(
    adapted,
    target_modules=['embed_tokens', 'up_proj'],
    ensure_weight_tying=True,
    rank_pattern={'embed_tokens': 2, 'lm_head': 2},
  )
  model.save_pretrained(tmp_path, save_embedding_layers=False)
  adapter = load_adapter(tmp_path, adapted.config)
  assert adapter.trainable['embed']['embedding']['a'].shape == (48, 2)
  merged = merge(adapted.params, adapter.trainable, adapter.spec)
  assert_close(torch_logits(model), logits_of(adapted.config, merged))


@pytest.mark.filterwarnings('ignore:.*tie_word_embeddings')
def test_a_tied_embedding_that_leaves_the_head_alone_is_refused(
  make_adapted, tmp_path
):
  adapted = make_adapted(tied=True)
  model = make_peft_model(adapted, target_modules=['embed_tokens'])
  model.save_pretrained(tmp_path, save_embedding_layers=False)
  with pytest.raises(AdapterError, match='change one use only'):
    load_adapter(tmp_path, adapted.config)


@pytest.mark.parametrize(
  ('tied', 'fields'),
  [
    (True, {'init': 'pissa'}),
    (True, {'init': 'loftq', **RANKS, 'scaling': 'rslora'}),
    (False, {'init': 'olora', **RANKS, 'variant': 'dora'}),
  ],
)
def test_an_init_that_changed_the_base_is_plain_lora_for_peft(
  make_adapted, tmp_path, tied, fields
):
  peft = pytest.importorskip('peft')
  adapted = make_adapted(tied, **fields)
  initial = make_adapted(tied, **fields, seed=1).trainable
  adapted.save(tmp_path / 'adapter', initial=initial)
  base = make_oracle(adapted.config, adapted.params)
  model = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter')
  taken = {
    path: -leaf if path.endswith('/b') else leaf
    for path, leaf in tree.leaves_by_path(initial).items()
    if not path.endswith('/magnitude')
  }
  spec = dataclasses.replace(adapted.spec, variant='lora')
  residual = merge(adapted.params, tree.nest(taken), spec)
  merged = merge(residual, adapted.trainable, adapted.spec)
  expected = logits_of(adapted.config, merged)
  assert_close(torch_logits(model.eval()), expected)
  adapter = load_adapter(tmp_path / 'adapter', adapted.config)
  merged = merge(adapted.params, adapter.trainable, adapter.spec)
  assert_close(logits_of(adapted.config, merged), expected)


def make_peft_model(adapted, **fields):
  """Returns a model in PEFT with adapters that are away from zero."""
  peft = pytest.importorskip('peft')
  torch = pytest.importorskip('torch')
  model = peft.get_peft_model(
    make_oracle(adapted.config, adapted.params),
    peft.LoraConfig(r=4, lora_alpha=10, task_type='CAUSAL_LM', **fields),
  )
  torch.manual_seed(0)
  for value in model.parameters():
    if value.requires_grad:
      value.data += 0.2 * torch.randn_like(value)
  return model.eval()


@pytest.mark.filterwarnings('ignore:.*save_embedding_layers')
def test_the_base_that_peft_repeats_is_compared_with_the_base(
  make_adapted, tmp_path
):
  adapted = make_adapted(tied=False)
  model = make_peft_model(adapted, target_modules=['lm_head', 'embed_tokens'])
  model.save_pretrained(tmp_path)  # adds both base layers
  adapter = load_adapter(tmp_path, adapted.config)
  assert adapter.base_leaves.keys() == {'embed/embedding', 'lm_head/kernel'}
  adapters.check_base_leaves(adapter, adapted.params)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapted.params)
  adapters.check_base_leaves(adapter, rounded)
  other = jax.tree.map(lambda x: x * 1.01, adapted.params)
  with pytest.raises(AdapterError, match="'embed/embedding' of its base"):
    adapters.check_base_leaves(adapter, other)


def test_the_files_come_back_as_the_trees_they_were(adapted, adapter_folder):
  adapter = load_adapter(adapter_folder, adapted.config)
  jax.tree.map(
    np.testing.assert_array_equal, adapter.trainable, adapted.trainable
  )
  spec = adapter.spec
  assert (spec.rank, spec.alpha, spec.dropout) == (4, 10.0, 0.05)
  assert spec.train_full == ('final_norm/scale',)
  assert adapter.metadata['step'] == 7
  assert adapter.metadata['lora']['targets'] == list(adapted.spec.targets)


@pytest.mark.parametrize(
  'fields',
  [
    {'train_full': ('final_norm/scale',)},
    {**RANKS, 'scaling': 'rslora'},
    {'exclude': ('layers/1/.*',), 'variant': 'dora'},
    {'train_rows': {'embed/embedding': (3, 5)}, 'dropout': 0.1},
  ],
)
def test_a_round_trip_gives_the_same_bytes(make_adapted, tmp_path, fields):
  adapted = make_adapted(**fields)
  adapted.save(tmp_path / 'first')
  adapted.expect_same_bytes_again(tmp_path / 'first')


def test_tensors_are_sorted_float32_in_the_torch_layout(adapter_folder):
  content = (adapter_folder / adapters.TENSORS_FILE).read_bytes()
  size = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8 : 8 + size])
  assert header.pop('__metadata__') == {'format': 'pt'}
  assert list(header) == sorted(header)
  assert {entry['dtype'] for entry in header.values()} == {'F32'}
  module = 'base_model.model.model.layers.1.mlp.up_proj'
  assert header[f'{module}.lora_A.weight']['shape'] == [4, 16]
  assert header[f'{module}.lora_B.weight']['shape'] == [24, 4]


def test_an_adapter_of_a_smaller_model_is_refused(adapted, adapter_folder):
  larger = dataclasses.replace(adapted.config, layers=4)
  with pytest.raises(AdapterError, match=r'lacks .*layers\.3'):
    load_adapter(adapter_folder, larger)


def test_a_model_that_is_trained_whole_is_no_adapter(make_adapted, tmp_path):
  adapted = make_adapted(targets=(), train_full=('.*',))
  with pytest.raises(AdapterError, match='--to=merged'):
    adapted.save(tmp_path / 'adapter')
