"""Adapters that began as a part of the base, put on that base again."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.peft import save_adapter
from jlora.checkpoints.placement import load_split
from jlora.core import initializers
from jlora.errors import AdapterError
from jlora.inference.tuned import load_tuned
from jlora.models import families


@pytest.fixture(scope='module')
def make_adapter(tiny_base, tmp_path_factory):
  """Writes an adapter as a run does; returns both halves and the folder."""

  def make(init, quant, **fields):
    base = open_base(str(tiny_base))
    spec = jlora.LoraSpec(rank=4, alpha=6.0, init=init, **fields)
    spec = families.resolve(spec, base.config)
    quant = quant and families.resolve(quant, base.config)
    key = jax.random.key(0)
    loaded = load_split(key, base, spec, quant, jnp.float32)
    frozen, initial, starts = loaded
    random = np.random.default_rng(1)
    trained = jax.tree.map(
      lambda x: x * np.asarray(random.uniform(0.9, 1.1, x.shape), 'f4'), initial
    )
    folder = tmp_path_factory.mktemp('adapter') / 'adapter'
    metadata = {
      'base_sha256': base.sha256,
      'quantization': quant and dataclasses.asdict(quant),
    }
    save_adapter(
      folder,
      trained,
      spec,
      base.config,
      base_name=base.name,
      metadata=metadata,
      starts=starts,
    )
    return (frozen, trained, spec), folder

  return make


@pytest.mark.parametrize(
  ('init', 'quant', 'fields'),
  [
    ('lora', True, {'variant': 'dora'}),
    ('pissa', True, {'train_full': ('.*norm/scale',)}),
    ('pissa', False, {'variant': 'dora'}),
    ('olora', True, {'rank_pattern': (('layers/1/.*', 2),)}),
    ('loftq', True, {'targets': 'mlp'}),
  ],
)
def test_both_halves_are_those_of_training(
  make_adapter, tiny_base, init, quant, fields
):
  quant = jlora.QuantSpec() if quant else None
  (frozen, trained, spec), folder = make_adapter(init, quant, **fields)
  tuned = load_tuned(str(tiny_base), folder, dtype='float32')
  chex.assert_trees_all_equal(tuned.frozen, frozen)
  chex.assert_trees_all_equal(tuned.trainable, trained)
  assert tuned.spec.changes_base == spec.changes_base


def test_on_an_unknown_base_it_is_plain_lora_of_twice_the_rank(
  make_adapter, tiny_base
):
  halves, folder = make_adapter('pissa', None)
  (folder / 'jlora_metadata.json').unlink()
  with pytest.warns(UserWarning, match='not known to belong'):
    tuned = load_tuned(str(tiny_base), folder, dtype='float32')
  assert tuned.spec.rank == 8
  chex.assert_trees_all_close(
    tuned.dense('float32'), jlora.merge(*halves), atol=1e-5
  )


def test_the_start_is_read_and_not_found_again(
  make_adapter, tiny_base, monkeypatch
):
  (frozen, _, _), folder = make_adapter('loftq', jlora.QuantSpec())
  monkeypatch.setattr(initializers, 'start', None)
  tuned = load_tuned(str(tiny_base), folder, dtype='float32')
  chex.assert_trees_all_equal(tuned.frozen, frozen)


def test_without_its_start_loftq_is_what_peft_would_have(
  make_adapter, tiny_base
):
  (frozen, trained, spec), folder = make_adapter('loftq', jlora.QuantSpec())
  metadata = json.loads((folder / 'jlora_metadata.json').read_text())
  del metadata['digests']['jlora_start.safetensors']
  (folder / 'jlora_start.safetensors').unlink()
  (folder / 'jlora_metadata.json').write_text(json.dumps(metadata))
  with pytest.warns(UserWarning, match='began as a part of a base'):
    tuned = load_tuned(str(tiny_base), folder, dtype='float32')
  assert tuned.quant is None
  wide = tuned.dense('float32')['layers']['mlp']['up_proj']['kernel']
  merged = jlora.merge(frozen, trained, spec)
  merged = merged['layers']['mlp']['up_proj']['kernel']
  assert np.linalg.norm(wide - merged) < 0.2 * np.linalg.norm(merged)


def test_a_damaged_start_is_refused(make_adapter, tiny_base):
  _, folder = make_adapter('loftq', jlora.QuantSpec())
  (folder / 'jlora_start.safetensors').write_bytes(b'x')
  with pytest.raises(AdapterError, match=r'start.* is damaged'):
    load_tuned(str(tiny_base), folder, dtype='float32')


@pytest.mark.parametrize(
  ('field', 'value'),
  [('lora', None), ('lora', {'foo': 1}), ('quantization', [1])],
)
def test_metadata_that_is_no_spec_is_refused(
  make_adapter, tiny_base, field, value
):
  _, folder = make_adapter('lora', None)
  metadata = json.loads((folder / 'jlora_metadata.json').read_text())
  (folder / 'jlora_metadata.json').write_text(
    json.dumps(metadata | {field: value})
  )
  with pytest.raises(AdapterError, match=f'has {field}=.*which is no'):
    load_tuned(str(tiny_base), folder, dtype='float32')
