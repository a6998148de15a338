import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints import adapters
from jlora.checkpoints.peft import load_adapter
from jlora.errors import AdapterError


def test_an_adapter_merges_into_its_base(adapted, adapter_folder):
  adapter = load_adapter(adapter_folder, adapted.config)
  frozen, _ = jlora.partition(jax.random.key(0), adapted.params, adapter.spec)
  merged = jlora.merge(frozen, adapter.trainable, adapter.spec)
  leaf = adapted.trainable['layers']['mlp']['up_proj']['kernel']
  expected = adapted.params['layers']['mlp']['up_proj']['kernel'] + 10.0 / 4 * (
    leaf['a'] @ leaf['b']
  )
  found = merged['layers']['mlp']['up_proj']['kernel']
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_same_base_is_known_to_be_the_same():
  assert adapters.check_fingerprint({'base_sha256': 'ab'}, 'ab')


def test_another_base_is_refused_with_both_fingerprints():
  with pytest.raises(AdapterError, match=r'sha256 ab.* has cd'):
    adapters.check_fingerprint({'base_sha256': 'ab'}, 'cd')


def test_another_base_is_accepted_on_request_and_said_to_be_other():
  metadata = {'base_sha256': 'ab'}
  assert not adapters.check_fingerprint(metadata, 'cd', allow_other_base=True)


def test_an_adapter_without_a_fingerprint_fits_but_is_not_verified():
  assert not adapters.check_fingerprint({}, 'cd')


@pytest.mark.parametrize('name', [adapters.CONFIG_FILE, adapters.TENSORS_FILE])
def test_a_flipped_bit_is_found(adapted, adapter_folder, name):
  content = bytearray((adapter_folder / name).read_bytes())
  content[-20] ^= 1
  (adapter_folder / name).write_bytes(content)
  with pytest.raises(AdapterError, match=f'{name} has sha256'):
    load_adapter(adapter_folder, adapted.config)


@pytest.mark.parametrize('name', [adapters.CONFIG_FILE, adapters.TENSORS_FILE])
def test_a_missing_file_is_named(adapted, adapter_folder, name):
  (adapter_folder / name).unlink()
  with pytest.raises(AdapterError, match=f'{name} is missing'):
    load_adapter(adapter_folder, adapted.config)


def test_a_pickle_is_refused_with_the_way_out(adapted, adapter_folder):
  tensors = adapter_folder / adapters.TENSORS_FILE
  tensors.rename(adapter_folder / 'adapter_model.bin')
  with pytest.raises(AdapterError, match=r'pickle.*save it again'):
    load_adapter(adapter_folder, adapted.config)


def test_an_adapter_that_a_killed_save_had_moved_aside_loads(
  adapted, adapter_folder
):
  adapter_folder.rename(adapter_folder.with_name('.adapter.jlora-old'))
  assert load_adapter(adapter_folder, adapted.config).metadata['step'] == 7


@pytest.mark.parametrize(
  ('content', 'named'),
  [
    (b'{"digests": ', 'is no JSON'),
    (b'\xff\xfe', 'is no JSON'),
    (b'[' * 100_000, 'is no JSON'),
    (b'[1]', r'not \[1\]'),
    (b'{}', "lacks the field 'digests'"),
    (b' ' * (1 << 20) + b'{}', 'has 1048578 bytes'),
  ],
)
def test_malformed_metadata_is_refused(adapted, adapter_folder, content, named):
  (adapter_folder / adapters.METADATA_FILE).write_bytes(content)
  with pytest.raises(AdapterError, match=named):
    load_adapter(adapter_folder, adapted.config)


def test_metadata_that_is_no_json_leaves_nothing_behind(adapted, tmp_path):
  with pytest.raises(ValueError, match='JSON compliant'):
    adapted.save(tmp_path / 'x', loss=float('nan'))
  assert list(tmp_path.iterdir()) == []
