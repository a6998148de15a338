"""Adapters of experts and routers, in PEFT and here, both ways."""

import copy
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jlora.checkpoints.peft import load_adapter, split_initial
from jlora.checkpoints.peft_selection import select
from jlora.core import lora, targets, tree
from jlora.errors import AdapterError
from jlora.models import layout
from tests.decoders import (
  PATTERNS_OF_PARAMETERS,
  assert_near,
  compiled,
  make_config,
  make_oracle,
)

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')

pytestmark = [
  pytest.mark.filterwarnings('ignore:.*is deprecated:FutureWarning'),
  pytest.mark.filterwarnings(PATTERNS_OF_PARAMETERS),
]

TOKENS = np.arange(24).reshape(2, 12) * 5 % 96
GATE, UP, DOWN = (
  f'layers/mlp/experts/{name}_proj/kernel' for name in ('gate', 'up', 'down')
)
ROUTER = 'layers/mlp/router/kernel'
ONE_LAYER, ONE_EXPERT = 'layers/1/mlp/experts/.*', '.*/experts/2/.*'


def small(family):
  sizes = {'layers': 2, 'experts': 3}
  if family == 'mixtral':
    sizes['local_layers'] = (0, 1)
  return dataclasses.replace(make_config(family), **sizes)


@pytest.fixture(params=['mixtral', 'qwen3_moe'])
def config(request):
  return small(request.param)


@pytest.fixture(scope='module')
def oracle(make_adapted):
  """Returns a copy of a model of transformers with the usual parameters."""

  @functools.cache
  def make(config):
    return make_oracle(config, make_adapted(config=config).params)

  return lambda config: copy.deepcopy(make(config))


def updates_of(config, spec, trainable):
  """Returns what is added to each kernel."""
  shapes = layout.shapes(config)
  adapted = targets.select(shapes, spec.targets, spec.exclude, spec.axes)
  strengths = lora.strengths(adapted, spec)
  nodes = tree.nodes_by_path(trainable)
  added = {
    path: x.scales[..., None, None] * (nodes[path]['a'] @ nodes[path]['b'])
    for path, x in strengths.items()
  }
  return added


def logits_of(adapted):
  """Returns the logits of what a trained decoder is by definition."""
  added = updates_of(adapted.config, adapted.spec, adapted.trainable)
  nodes, merged = tree.nodes_by_path(adapted.trainable), {}
  for path, leaf in tree.leaves_by_path(adapted.params).items():
    leaf = nodes.get(path, {}).get('full', leaf)
    merged[path] = jnp.asarray(leaf + added.get(path, 0), jnp.float32)
  params = {'params': tree.nest(merged)}
  return np.asarray(compiled(adapted.config)(params, jnp.asarray(TOKENS)))


def torch_logits(model):
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS)).logits.numpy()


SPECS = {
  'plain': {'targets': 'all-linear'},
  'rslora': {'targets': 'all-linear', 'scaling': 'rslora', 'alpha': 7.1},
  'patterns by kernel': {
    'targets': 'all-linear',
    'rank_pattern': {UP: 3, '.*/q_proj/kernel': 2},
    'alpha_pattern': {GATE: 7, DOWN: 5},
  },
  'patterns by layer': {
    'targets': 'mlp',
    'scaling': 'rslora',
    'rank_pattern': {ONE_LAYER: 2},
    'alpha_pattern': {ONE_LAYER: 3.3},
  },
  'patterns by expert': {
    'targets': 'mlp',
    'rank_pattern': {ONE_EXPERT: 6},
    'alpha_pattern': {ONE_EXPERT: 7},
  },
  'only up': {'targets': (UP,)},
  'only gate': {'targets': (GATE, '.*/v_proj/kernel')},
  'some': {
    'targets': (
      'layers/0/mlp/experts/[02]/up_proj/kernel',
      'layers/1/mlp/experts/./down_proj/kernel',
    ),
  },
  'dropout': {'targets': 'all-linear', 'dropout': 0.1},
  'router': {'targets': (ROUTER,), 'rank': 2, 'scaling': 'rslora'},
  'router and experts': {
    'targets': (ROUTER, 'mlp'),
    'rank_pattern': {ROUTER: 2},
  },
  'router in full': {'targets': 'all-linear', 'train_full': (ROUTER,)},
}


@pytest.mark.parametrize('name', SPECS)
def test_peft_computes_the_merged_logits(
  config, name, make_adapted, oracle, tmp_path
):
  adapted = make_adapted(config=config, **SPECS[name])
  adapted.save(tmp_path / 'adapter')
  model = peft.PeftModel.from_pretrained(oracle(config), tmp_path / 'adapter')
  assert_near(torch_logits(model), logits_of(adapted))
  adapted.expect_same_bytes_again(tmp_path / 'adapter')


@pytest.mark.parametrize('name', SPECS)
def test_what_was_saved_comes_back(name, make_adapted, tmp_path):
  adapted = make_adapted(config=small('mixtral'), **SPECS[name])
  adapted.save(tmp_path / 'adapter')
  found = load_adapter(tmp_path / 'adapter', adapted.config)
  both = (select(x.spec, adapted.config) for x in (found, adapted))
  assert next(both) == next(both)
  assert_same(found.trainable, adapted.trainable)


def assert_same(found, expected):
  """Holds arrays to one rounding: of a factor, such as 7 / 10, and back."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-23), found, expected
  )


@pytest.mark.parametrize('name', SPECS)
def test_without_metadata_the_blocks_say_what_was_saved(
  name, make_adapted, tmp_path
):
  adapted = make_adapted(config=small('qwen3_moe'), **SPECS[name])
  adapted.save(tmp_path / 'adapter')
  (tmp_path / 'adapter' / 'jlora_metadata.json').unlink()
  found = load_adapter(tmp_path / 'adapter', adapted.config)
  again = dataclasses.replace(
    adapted, spec=found.spec, trainable=found.trainable
  )
  both = (updates_of(x.config, x.spec, x.trainable) for x in (again, adapted))
  for x, y in zip(next(both).values(), next(both).values(), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
  again.save(tmp_path / 'again')
  for file in ('adapter_config.json', 'adapter_model.safetensors'):
    both = (tmp_path / folder / file for folder in ('adapter', 'again'))
    assert next(both).read_bytes() == next(both).read_bytes()


CONFIGS = {
  'gate_up_proj': {'alpha_pattern': {'mlp.experts.gate_up_proj': 12}},
  'experts.down_proj': {'use_rslora': True},
  'gate.weight': {'rank_pattern': {'model.layers.1.mlp.gate.weight': 2}},
  'model.layers.1.mlp.experts.gate_up_proj': {'target_modules': ['v_proj']},
}


def train(model):
  """Moves what an adapter of PEFT trains away from where it starts."""
  torch.manual_seed(0)
  for key, value in model.named_parameters():
    if 'lora_B' in key or 'modules_to_save' in key:
      value.data += 0.1 * torch.randn_like(value)


@pytest.mark.parametrize('name', CONFIGS)
def test_fused_pairs_of_peft_are_read(name, make_adapted, oracle, tmp_path):
  adapted = make_adapted(config=small('mixtral'))
  fields = {'target_modules': [], **CONFIGS[name]}
  model = peft.get_peft_model(
    oracle(adapted.config),
    peft.LoraConfig(r=3, target_parameters=[name], **fields),
  )
  train(model)
  model.save_pretrained(tmp_path / 'adapter', save_embedding_layers=False)
  loaded = load_adapter(tmp_path / 'adapter', adapted.config)
  found = dataclasses.replace(
    adapted, spec=loaded.spec, trainable=loaded.trainable
  )
  assert_near(logits_of(found), torch_logits(model))


def test_a_router_that_peft_trained_in_full_is_read(
  config, make_adapted, oracle, tmp_path
):
  adapted = make_adapted(config=config)
  model = peft.get_peft_model(
    oracle(config),
    peft.LoraConfig(target_modules=['q_proj'], modules_to_save=['gate']),
  )
  train(model)
  model.save_pretrained(tmp_path / 'adapter', save_embedding_layers=False)
  loaded = load_adapter(tmp_path / 'adapter', config)
  assert loaded.spec.train_full == (ROUTER,)
  found = dataclasses.replace(
    adapted, spec=loaded.spec, trainable=loaded.trainable
  )
  assert_near(logits_of(found), torch_logits(model))


def test_pairs_of_single_experts_are_read(make_adapted, tmp_path):
  adapted = make_adapted(
    config=small('mixtral'),
    targets='mlp',
    train_full=(ROUTER,),
    scaling='rslora',
    dropout=0.1,
  )
  mlp, tensors = adapted.trainable['layers']['mlp'], {}
  names = {'gate_proj': 'w1', 'up_proj': 'w3', 'down_proj': 'w2'}
  for layer in range(2):
    block = f'base_model.model.model.layers.{layer}.block_sparse_moe'
    tensors[f'{block}.gate.weight'] = mlp['router']['kernel']['full'][layer].T
    for (kernel, name), i in itertools.product(names.items(), range(3)):
      pair = mlp['experts'][kernel]['kernel']
      for end, part in (('lora_A', 'a'), ('lora_B', 'b')):
        key = f'{block}.experts.{i}.{name}.{end}.weight'
        tensors[key] = pair[part][layer, i].T
  fields = {
    'peft_type': 'LORA',
    'r': 4,
    'lora_alpha': 10,
    'lora_dropout': 0.1,
    'modules_to_save': ['gate'],
    'target_modules': list(names.values()),
    'use_rslora': True,
  }
  write_files(tmp_path, fields, tensors)
  found = load_adapter(tmp_path, adapted.config)
  assert found.spec.scaling == 'rslora'
  assert found.spec.dropout == 0.1
  jax.tree.map(
    np.testing.assert_array_equal, found.trainable, adapted.trainable
  )


def write_files(folder, fields, tensors):
  (folder / 'adapter_config.json').write_text(json.dumps(fields))
  tensors = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
  safetensors.numpy.save_file(tensors, folder / 'adapter_model.safetensors')


def test_experts_that_began_as_a_part_of_the_base_come_back(
  make_adapted, tmp_path
):
  fields = {'init': 'pissa', **SPECS['patterns by expert']}
  adapted, began = (
    make_adapted(config=small('mixtral'), seed=seed, **fields)
    for seed in (0, 1)
  )
  adapted.save(tmp_path / 'x', initial=began.trainable)
  loaded = load_adapter(tmp_path / 'x', adapted.config)
  trained, initial, _ = split_initial(loaded, adapted.config)
  assert_same(trained, adapted.trainable)
  assert_same(initial, began.trainable)


def test_experts_that_are_trained_in_full_have_no_file(make_adapted, tmp_path):
  adapted = make_adapted(
    config=small('qwen3_moe'),
    train_full=('.*/experts/up_proj/kernel',),
    targets=('.*/v_proj/kernel',),
  )
  with pytest.raises(AdapterError, match='no file for single experts'):
    adapted.save(tmp_path / 'adapter')


def test_dora_of_a_router_is_refused(config, make_adapted, tmp_path):
  adapted = make_adapted(config=config, targets=(ROUTER,), variant='dora')
  with pytest.raises(AdapterError, match='DoRA of experts or of their router'):
    adapted.save(tmp_path / 'adapter')


def test_an_unknown_parameter_is_refused(make_adapted, tmp_path):
  adapted = make_adapted(config=small('mixtral'), targets='all-linear')
  fields = {'peft_type': 'LORA', 'target_parameters': ['w1.weight']}
  write_files(tmp_path, fields, {})
  with pytest.raises(AdapterError, match=r"'w1.weight'.*gate_up_proj"):
    load_adapter(tmp_path, adapted.config)
