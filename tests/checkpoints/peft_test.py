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
from jlora.models import families
from jlora.models.decoder import Decoder

# transformers warns of its own deprecated names when PEFT asks for them.
pytestmark = pytest.mark.filterwarnings('ignore:.*is deprecated:FutureWarning')

TOKENS = jnp.arange(14).reshape(2, 7)


def merge(params, trainable, spec):
  """Returns W + alpha / rank * a @ b, by hand."""
  leaves = tree.leaves_by_path(params)
  nodes = tree.leaves_by_path(trainable, lambda x: 'a' in x or 'full' in x)
  for path, node in nodes.items():
    if 'full' in node:
      leaves[path] = node['full']
    else:
      update = spec.alpha / spec.rank * node['a'] @ node['b']
      leaves[path] = leaves[path] + update
  return tree.nest(leaves)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params):
  return Decoder(config).apply({'params': params}, TOKENS)


def logits_of(config, params):
  return np.asarray(apply(config, params))


def make_torch_model(config, params):
  """Returns the model in transformers with the same weights."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  fields = families.to_hf_config(config)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig.from_dict(fields)
  )
  leaves = tree.leaves_by_path(params)
  state = {}
  for weight in families.weights(config):
    leaf = np.asarray(leaves[weight.path])
    for module, array in zip(
      weight.modules, leaf if weight.stacked else [leaf], strict=True
    ):
      array = array.T if weight.transposed else array
      state[f'{module}.weight'] = torch.tensor(array)
  if config.tie_embeddings:
    state['lm_head.weight'] = state['model.embed_tokens.weight']
  model.load_state_dict(state)
  return model.eval()


def torch_logits(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model(torch.tensor(np.asarray(TOKENS))).logits.numpy()


def assert_close(found, expected):
  # float32 over five products of at most 24 terms: about 2e-6.
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
  ('tied', 'fields'),
  [
    (True, {}),
    (True, {'targets': 'all-linear'}),
    (False, {'targets': ('lm_head/kernel', '.*_proj/kernel')}),
    (True, {'train_full': ('embed/embedding', '.*norm/scale')}),
    (False, {'train_full': ('embed/embedding', 'lm_head/kernel')}),
    (True, {'train_full': ('final_norm/scale', '.*/o_proj/kernel')}),
  ],
)
def test_peft_computes_the_merged_logits(make_adapted, tmp_path, tied, fields):
  peft = pytest.importorskip('peft')
  adapted = make_adapted(tied, **fields)
  adapted.save(tmp_path / 'adapter')
  base = make_torch_model(adapted.config, adapted.params)
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
  ],
)
def test_an_adapter_from_peft_gives_the_logits_it_has_there(
  make_adapted, tmp_path, tied, fields
):
  peft = pytest.importorskip('peft')
  torch = pytest.importorskip('torch')
  adapted = make_adapted(tied)
  model = peft.get_peft_model(
    make_torch_model(adapted.config, adapted.params),
    peft.LoraConfig(r=4, lora_alpha=10, task_type='CAUSAL_LM', **fields),
  )
  torch.manual_seed(0)
  for value in model.parameters():
    if value.requires_grad:
      value.data += 0.2 * torch.randn_like(value)
  model.save_pretrained(tmp_path, save_embedding_layers=False)
  adapter = load_adapter(tmp_path, adapted.config)
  merged = merge(adapted.params, adapter.trainable, adapter.spec)
  assert_close(torch_logits(model.eval()), logits_of(adapted.config, merged))
  assert adapter.metadata == {}


def test_the_files_come_back_as_the_trees_they_were(adapted, adapter_folder):
  adapter = load_adapter(adapter_folder, adapted.config)
  jax.tree.map(
    np.testing.assert_array_equal, adapter.trainable, adapted.trainable
  )
  assert (adapter.rank, adapter.alpha, adapter.dropout) == (4, 10.0, 0.05)
  assert adapter.train_full == ('final_norm/scale',)
  assert adapter.metadata == {
    'base_sha256': 'ab',
    'jlora_version': jlora.__version__,
    'step': 7,
  }


def test_a_round_trip_gives_the_same_bytes(adapted, adapter_folder, tmp_path):
  adapter = load_adapter(adapter_folder, adapted.config)
  again = dataclasses.replace(
    adapted, spec=adapter.spec, trainable=adapter.trainable
  )
  again.save(tmp_path / 'again', **adapter.metadata)
  for path in adapter_folder.iterdir():
    assert (tmp_path / 'again' / path.name).read_bytes() == path.read_bytes()


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


KERNEL = {'a': np.ones((3, 16, 4)), 'b': np.ones((3, 4, 24))}
PAIR = {'a': np.ones((48, 4)), 'b': np.ones((4, 16))}

REFUSED_LEAVES = [
  ('head/kernel', KERNEL, "'head/kernel', which is no leaf"),
  ('embed/embedding', PAIR, 'is no linear layer'),
  ('layers/mlp/up_proj/kernel', {'a': KERNEL['a']}, 'base and rank need'),
  ('layers/mlp/gate_proj/kernel', PAIR, 'base and rank need'),
  ('final_norm/scale', {'full': np.ones(4)}, 'base and rank need'),
  ('final_norm/scale', {'full': np.full(16, np.nan)}, '16 of 16 values NaN'),
]


@pytest.mark.parametrize(('path', 'leaf', 'named'), REFUSED_LEAVES)
def test_a_leaf_that_does_not_fit_is_not_written(
  adapted, tmp_path, path, leaf, named
):
  broken = dataclasses.replace(adapted, trainable=tree.nest({path: leaf}))
  with pytest.raises(AdapterError, match=named):
    broken.save(tmp_path / 'adapter')
  assert list(tmp_path.iterdir()) == []
