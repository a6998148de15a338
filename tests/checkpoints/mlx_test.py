"""Adapters in mlx-lm's layout, written here as its documentation has it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.checkpoints.peft import load_adapter
from jlora.core.tree import leaves_by_path
from jlora.errors import AdapterError
from tests.decoders import make_config, make_params, stored

RNG = np.random.default_rng(0)
KEYS = ('self_attn.q_proj', 'self_attn.v_proj', 'mlp.down_proj')
UP = 'model.layers.1.mlp.up_proj'


def write(folder, tensors, **changes):
  """Writes an adapter as mlx-lm's trainer does."""
  strength = {'rank': 3, 'scale': 2.5, 'dropout': 0.05, 'alpha': 16}
  fields = {
    'model': 'tiny',
    'fine_tune_type': 'lora',
    'num_layers': 2,
    'lora_parameters': strength | changes.pop('lora_parameters', {}),
    'optimizer': 'adam',
    'learning_rate': 1e-5,
    **changes,
  }
  folder.mkdir(exist_ok=True)
  (folder / 'adapter_config.json').write_text(json.dumps(fields))
  save_file(tensors, folder / 'adapters.safetensors')
  return folder


def make_tensors(config, modules, dora=False, rank=3):
  shapes = {k: x.shape for k, x in stored(config, make_params(config)).items()}
  tensors = {}
  for module in modules:
    out, size = shapes[f'{module}.weight']
    if 'embed' in module:
      out, size = size, out
    tensors[f'{module}.lora_a'] = RNG.normal(size=(size, rank)).astype('f4')
    tensors[f'{module}.lora_b'] = RNG.normal(size=(rank, out)).astype('f4')
    if dora:
      tensors[f'{module}.m'] = RNG.uniform(1, 2, out).astype('f4')
  return tensors


def modules_of(layers=(1, 2), keys=KEYS):
  return [f'model.layers.{i}.{key}' for i in layers for key in keys]


@pytest.mark.parametrize('family', ['llama', 'qwen3', 'phi3', 'llama untied'])
@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_the_merged_weights_are_those_of_mlx(family, kind, tmp_path):
  config = make_config(family)
  keys = ('self_attn.o_proj', 'mlp.down_proj')
  modules = modules_of(keys=keys)
  modules += ['lm_head'] if not config.tie_embeddings else []
  modules += ['model.embed_tokens'] if kind == 'lora' else []
  tensors = make_tensors(config, modules, kind == 'dora')
  folder = write(tmp_path / 'a', tensors, fine_tune_type=kind)
  adapter = load_adapter(folder, config)
  params = make_params(config)
  frozen, _ = jlora.partition(jax.random.key(0), params, adapter.spec)
  merged = jlora.merge(frozen, adapter.trainable, adapter.spec)
  found = stored(config, merged)
  for name, weight in stored(config, params).items():
    module = name.removesuffix('.weight')
    if module in modules:
      a, b = (tensors[f'{module}.lora_{x}'] for x in 'ab')
      update = np.float32(2.5) * a @ b
      weight = weight + (update if 'embed' in module else update.T)
      if kind == 'dora':
        norm = tensors[f'{module}.m'] / np.linalg.norm(weight, axis=1)
        weight = norm[:, None] * weight
    np.testing.assert_allclose(found[name], weight, rtol=0, atol=2e-5)


def test_only_the_last_layers_have_an_adapter(tmp_path):
  config = make_config('llama')
  tensors = make_tensors(config, modules_of())
  adapter = load_adapter(write(tmp_path / 'a', tensors), config)
  a = adapter.trainable['layers']['mlp']['down_proj']['kernel']['a']
  assert not a[0].any()
  assert a[1:].any(axis=(1, 2)).all()
  assert adapter.spec.dropout == 0.05
  assert len(leaves_by_path(adapter.trainable)) == 6
  every = make_tensors(config, modules_of(range(3)))
  load_adapter(write(tmp_path / 'b', every, num_layers=-1), config)


def change(tensors, drop=(), **new):
  return {k: x for k, x in tensors.items() if k not in drop} | new


@pytest.mark.parametrize(
  ('drop', 'new', 'fields', 'message'),
  [
    (['{}.lora_b'], {}, {}, r"lacks 'model.layers.1.self_attn.q_proj.lora_b'"),
    (['{}.lora_a', '{}.lora_b'], {}, {}, "layer 1 lacks .*'self_attn.q_proj'"),
    ([], {f'{UP}.lora_a': (32, 3)}, {}, r"layer 2 lacks .*'mlp.up_proj'"),
    ([], {'{}.lora_c': (3, 3)}, {}, 'is no part of a low-rank pair'),
    ([], {'{}.lora_a_scales': (3, 3)}, {}, 'is no part of a low-rank pair'),
    ([], {'{}.m': (48,)}, {}, "holds 'model.layers.1.self_attn.q_proj.m'"),
    ([], {'model.layers.1.mlp.x.lora_a': (3, 3)}, {}, 'no linear layer'),
    ([], {'model.layers.9.mlp.up_proj.lora_a': (3, 3)}, {}, 'no linear layer'),
    ([], {'{}.lora_a': (32, 4)}, {}, r'shape \(32, 4\)'),
    ([], {}, {'num_layers': 3}, "layer 0 lacks .*'mlp.down_proj'"),
    ([], {}, {'num_layers': 1}, "layer 1 has an adapter of 'mlp.down_proj'"),
    ([], {}, {'num_layers': None}, 'num_layers is None'),
    ([], {}, {'fine_tune_type': 'full'}, "'full'.*mlx_lm.fuse"),
    ([], {}, {'fine_tune_type': 'dora'}, r"lacks .*\.m'"),
    ([], {}, {'lora_parameters': {'rank': 4}}, 'shape'),
    ([], {}, {'lora_parameters': {'scale': None}}, 'scale is None'),
    ([], {}, {'lora_parameters': {'dropout': 'x'}}, "dropout is 'x'"),
    ([], {}, {'lora_parameters': {'dropout': []}}, r'dropout is \[\]'),
    ([], {}, {'lora_parameters': {'dropout': 1}}, 'dropout is 1'),
    ([], {}, {'lora_parameters': {'keys': 5}}, 'keys is 5'),
    ([], {}, {'lora_parameters': {'keys': [['a']]}}, 'list of names'),
    ([], {}, {'lora_parameters': {'keys': 'mlp.up_proj'}}, 'list of names'),
    ([], {}, {'lora_parameters': {'use_rslora': True}}, 'use_rslora=True'),
    (
      [],
      {},
      {'lora_parameters': {'keys': [*KEYS, 'mlp.up_proj']}},
      "layer 1 lacks .*'mlp.up_proj'",
    ),
  ],
)
def test_what_is_not_whole_or_not_known_is_refused(
  tmp_path, drop, new, fields, message
):
  config, first = make_config('llama'), 'model.layers.1.self_attn.q_proj'
  tensors = change(
    make_tensors(config, modules_of()),
    [name.format(first) for name in drop],
    **{name.format(first): np.ones(x, 'f4') for name, x in new.items()},
  )
  folder = write(tmp_path / 'a', tensors, **fields)
  with pytest.raises(AdapterError, match=message) as caught:
    load_adapter(folder, config)
  assert '\n' not in str(caught.value)


def test_dora_of_an_embedding_is_another_function_and_refused(tmp_path):
  config = make_config('llama')
  modules = [*modules_of(), 'model.embed_tokens']
  tensors = make_tensors(config, modules, dora=True)
  folder = write(tmp_path / 'a', tensors, fine_tune_type='dora')
  with pytest.raises(AdapterError, match='magnitude for each token'):
    load_adapter(folder, config)


def test_values_that_are_not_finite_are_refused(tmp_path):
  config = make_config('llama')
  tensors = make_tensors(config, modules_of())
  next(iter(tensors.values()))[0, 0] = np.nan
  with pytest.raises(AdapterError, match='1 of 96 values NaN'):
    load_adapter(write(tmp_path / 'a', tensors), config)
  (tmp_path / 'a' / 'adapters.safetensors').write_bytes(b'no')
  with pytest.raises(AdapterError, match='no whole safetensors'):
    load_adapter(tmp_path / 'a', config)
