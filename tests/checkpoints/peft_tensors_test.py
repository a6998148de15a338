import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jlora.checkpoints import adapters
from jlora.checkpoints.peft import load_adapter
from jlora.errors import AdapterError

MODULE = 'base_model.model.model.layers.1.self_attn.q_proj'
KEY = f'{MODULE}.lora_A.weight'


def change_tensors(folder, change):
  """Passes the tensors of an adapter through `change`."""
  path = folder / adapters.TENSORS_FILE
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  path.write_bytes(safetensors.numpy.save(tensors))


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_16_bit_tensors_are_widened(foreign_folder, adapted, dtype):
  half = {}

  def narrow(tensors):
    for key in tensors:
      tensors[key] = tensors[key].astype(dtype)
    half.update(tensors)

  change_tensors(foreign_folder, narrow)
  trainable = load_adapter(foreign_folder, adapted.config).trainable
  a = trainable['layers']['attention']['q_proj']['kernel']['a']
  assert a.dtype == np.float32
  np.testing.assert_array_equal(a[1], half[KEY].T.astype(np.float32))


def set_to(key, value):
  return lambda tensors: tensors.update({key: np.asarray(value, np.float32)})


REFUSED_TENSORS = {
  'an orphan B': (lambda t: t.pop(KEY), 'lacks .*lora_A'),
  'an orphan A': (lambda t: t.pop(KEY.replace('_A', '_B')), 'lacks .*lora_B'),
  'a wrong shape': (set_to(KEY, np.ones((16, 4))), r'\(16, 4\)'),
  'a NaN': (set_to(KEY, np.full((4, 16), np.nan)), '64 of 64'),
  'an infinity': (set_to(KEY, np.full((4, 16), np.inf)), KEY),
  'float64': (lambda t: t.update({KEY: np.ones((4, 16))}), 'dtype F64'),
  'another model': (set_to(KEY.replace('.1.', '.9.'), [1]), 'layers.9'),
  'a path': (set_to('../../etc/passwd', [1]), '../../etc/passwd'),
  'DoRA': (set_to(f'{MODULE}.lora_magnitude_vector', [1]), 'use_dora is not'),
  'a bias': (set_to(f'{MODULE}.lora_B.bias', [1]), 'lora_bias'),
  'base': (set_to(f'{MODULE}.base_layer.weight', [1]), 'part of the base'),
  'an embedding': (
    set_to('base_model.model.model.embed_tokens.lora_embedding_A', [1]),
    'a low-rank pair that target_modules leaves out',
  ),
}


@pytest.mark.parametrize('case', REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused(foreign_folder, adapted, case):
  change, named = REFUSED_TENSORS[case]
  change_tensors(foreign_folder, change)
  with pytest.raises(AdapterError, match=named) as error:
    load_adapter(foreign_folder, adapted.config)
  assert adapters.TENSORS_FILE in str(error.value)


def test_a_truncated_file_is_refused(foreign_folder, adapted):
  path = foreign_folder / adapters.TENSORS_FILE
  content = path.read_bytes()
  for size in (0, 7, 100, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:size])
    with pytest.raises(AdapterError, match='no whole safetensors file'):
      load_adapter(foreign_folder, adapted.config)


def test_a_key_that_occurs_twice_is_refused(foreign_folder, adapted):
  path = foreign_folder / adapters.TENSORS_FILE
  content = path.read_bytes()
  size = struct.unpack('<Q', content[:8])[0]
  header = content[8 : 8 + size].rstrip()
  again = f',"{KEY}":{json.dumps(json.loads(header)[KEY])}}}'.encode()
  header = header[:-1] + again
  length = struct.pack('<Q', len(header))
  path.write_bytes(length + header + content[8 + size :])
  with pytest.raises(AdapterError, match='more than once'):
    load_adapter(foreign_folder, adapted.config)


@pytest.mark.parametrize(
  ('fields', 'part'),
  [
    ({'train_full': ('embed/embedding',)}, 'weight'),
    ({'targets': ('embed/embedding',)}, 'lora_B.weight'),
  ],
)
def test_two_values_for_a_tied_embedding_are_refused(
  make_adapted, tmp_path, fields, part
):
  adapted = make_adapted(**fields)
  adapted.save(tmp_path / 'x')
  (tmp_path / 'x' / adapters.METADATA_FILE).unlink()
  key = f'base_model.model.lm_head.{part}'
  change_tensors(tmp_path / 'x', lambda tensors: tensors[key].fill(1))
  with pytest.raises(AdapterError, match='another lm_head'):
    load_adapter(tmp_path / 'x', adapted.config)
