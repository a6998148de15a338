import json
import math

import pytest

from jlora.checkpoints import adapters
from jlora.checkpoints.peft import load_adapter
from jlora.checkpoints.peft_config import SCHEMA_VERSION
from jlora.errors import AdapterError


def read_fields(folder):
  return json.loads((folder / adapters.CONFIG_FILE).read_bytes())


def change_fields(folder, **fields):
  text = json.dumps({**read_fields(folder), **fields})
  (folder / adapters.CONFIG_FILE).write_text(text)


def test_the_config_has_every_field_of_peft(adapter_folder):
  peft = pytest.importorskip('peft')
  if peft.__version__ != SCHEMA_VERSION:
    pytest.skip(f'the fields are those of PEFT {SCHEMA_VERSION}')
  expected = peft.LoraConfig(target_modules=['x']).to_dict()
  fields = read_fields(adapter_folder)
  assert set(fields) == set(expected)
  assert list(fields) == sorted(fields)


def test_modules_are_named_by_their_last_part_where_that_is_exact(
  adapter_folder,
):
  fields = read_fields(adapter_folder)
  assert fields['target_modules'] == [
    'down_proj',
    'gate_proj',
    'q_proj',
    'up_proj',
    'v_proj',
  ]
  assert fields['modules_to_save'] == ['model.norm']  # 'norm' means all norms


def test_a_uniform_adapter_needs_no_pattern(adapter_folder):
  fields = read_fields(adapter_folder)
  assert (fields['r'], fields['lora_alpha']) == (4, 10)
  assert fields['rank_pattern'] == fields['alpha_pattern'] == {}


def test_other_ranks_and_alphas_are_written_by_whole_names(
  make_adapted, tmp_path
):
  make_adapted(
    targets=('.*/[qv]_proj/kernel',),
    rank_pattern={'layers/2/.*/q_proj/kernel': 2},
    alpha_pattern={'.*/v_proj/kernel': 2.5},
  ).save(tmp_path / 'x')
  fields = read_fields(tmp_path / 'x')
  assert fields['rank_pattern'] == {'^model.layers.2.self_attn.q_proj': 2}
  assert fields['alpha_pattern'] == {
    f'^model.layers.{i}.self_attn.v_proj': 2.5 for i in range(3)
  }


def test_the_most_frequent_rank_needs_no_pattern(make_adapted, tmp_path):
  pattern = {'layers/[12]/.*': 2}
  make_adapted(rank_pattern=pattern).save(tmp_path / 'x')
  fields = read_fields(tmp_path / 'x')
  assert fields['r'] == 2
  assert set(fields['rank_pattern'].values()) == {4}


def test_flags_say_what_is_computed(make_adapted, tmp_path):
  make_adapted(scaling='rslora', variant='dora').save(tmp_path / 'x')
  fields = read_fields(tmp_path / 'x')
  assert fields['use_rslora'] is fields['use_dora'] is True
  assert fields['ensure_weight_tying'] is False


def test_a_tied_embedding_is_tied_in_peft_with_one_rank(make_adapted, tmp_path):
  make_adapted(
    targets=('embed/embedding', '.*/q_proj/kernel'),
    rank_pattern={'embed/embedding': 2},
  ).save(tmp_path / 'x')
  fields = read_fields(tmp_path / 'x')
  assert fields['ensure_weight_tying'] is True
  assert fields['rank_pattern'] == {'^lm_head': 2, '^model.embed_tokens': 2}


def test_rows_of_a_head_are_named(make_adapted, tmp_path):
  rows = {'embed/embedding': (1, 2), 'lm_head/kernel': (2,)}
  make_adapted(False, train_rows=rows).save(tmp_path / 'x')
  fields = read_fields(tmp_path / 'x')
  assert fields['trainable_token_indices'] == {
    'lm_head': [2],
    'model.embed_tokens': [1, 2],
  }


def test_rslora_is_read_as_it_is(foreign_folder, adapted):
  change_fields(foreign_folder, use_rslora=True)
  adapter = load_adapter(foreign_folder, adapted.config)
  assert adapter.spec.scaling == 'rslora'
  assert adapter.spec.scale == 10.0 / math.sqrt(4)


def test_all_linear_leaves_the_output_head_out(make_adapted, tmp_path):
  adapted = make_adapted(tied=False, targets='all-linear')
  adapted.save(tmp_path / 'x')
  (tmp_path / 'x' / adapters.METADATA_FILE).unlink()
  change_fields(tmp_path / 'x', target_modules='all-linear')
  adapter = load_adapter(tmp_path / 'x', adapted.config)
  assert len(adapter.spec.targets) == 7


# Field, value, and what the refusal names.
REFUSED_FIELDS = [
  ('peft_type', 'LOHA', "peft_type is 'LOHA'"),
  ('use_dora', True, 'lacks .*lora_magnitude_vector'),
  ('arrow_config', {'top_k': 3}, 'arrow_config'),
  ('use_bdlora', {'nblocks': 2}, 'use_bdlora'),
  ('velora_config', {'x': 1}, 'velora_config'),
  ('monteclora_config', {'x': 1}, 'monteclora_config'),
  ('kasa_config', {'x': 1}, 'kasa_config'),
  ('alora_invocation_tokens', [1], 'alora_invocation_tokens'),
  ('use_qalora', True, 'use_qalora'),
  ('layer_replication', [[0, 2]], 'layer_replication'),
  ('lora_bias', True, 'lora_bias'),
  ('bias', 'lora_only', "bias is 'lora_only'"),
  ('trainable_token_indices', [1], 'lacks .*trainable_tokens_delta'),
  ('trainable_token_indices', [1, 1], r'has \[1, 1\]'),
  ('trainable_token_indices', 3, 'has 3'),
  ('trainable_token_indices', [True], r'has \[True\]'),
  ('trainable_token_indices', [48], 'from 0 to 47: they span 48 to 48'),
  ('trainable_token_indices', {'q_proj': [1]}, "'q_proj', which is not one of"),
  ('trainable_token_indices', {'lm_head': [1]}, 'None for .*one tensor'),
  ('target_parameters', ['x'], 'target_parameters'),
  ('some_new_field', 1, 'some_new_field is 1'),
  ('init_lora_weights', 'pissa', "init_lora_weights is 'pissa'"),
  ('init_lora_weights', 'pissa_niter_4', "'pissa_niter_4'"),
  ('init_lora_weights', 'olora', "'olora'"),
  ('init_lora_weights', 'corda', "'corda'"),
  ('init_lora_weights', 'lora_ga', "'lora_ga'"),
  ('init_lora_weights', 'loftq', "'loftq'"),
  ('target_modules', ['q_proj', 'c_attn'], "'c_attn', which is no module"),
  ('target_modules', ['q_proj', 'embed_tokens'], "without 'lm_head'"),
  ('target_modules', ['q_proj', 'lm_head'], "'lm_head' without"),
  ('target_modules', ['q_proj', 'input_layernorm'], 'neither a linear layer'),
  ('target_modules', None, 'target_modules is None'),
  ('target_modules', [3], r'target_modules is \[3\]'),
  ('target_modules', r'.*\.x', 'leaves no module'),
  ('target_modules', '(', 'no regular expression'),
  ('target_modules', r'.*layers\.[01]\..*q_proj', 'layers.0.mlp.down_proj'),
  ('target_modules', ['q_proj'], 'is not named by target_modules'),
  ('target_modules', 'all-linear', 'lacks .*k_proj'),
  ('exclude_modules', ['q_proj'], 'is not named by target_modules'),
  ('layers_to_transform', [0, 2], 'holds .*layers.1.*is not named by'),
  ('layers_to_transform', [0, 3], r'is \[0, 3\]; this base has .* 0 to 2'),
  ('layers_to_transform', 'all', "layers_to_transform is 'all'"),
  ('modules_to_save', ['norm', 'layers.0.mlp'], 'leaves out .*layers.1.mlp'),
  ('modules_to_save', 5, 'modules_to_save is 5'),
  ('modules_to_save', ['score'], "'score', which is no module"),
  ('modules_to_save', ['lm_head'], "'lm_head' without 'model.embed_tokens'"),
  ('modules_to_save', None, 'holds .*model.norm.weight'),
  ('r', 8, r'has shape \(4, 24\); base and rank need \(8, 24\)'),
  ('r', 0, 'r is 0'),
  ('r', True, 'r is True'),
  ('rank_pattern', {'q_proj': 8}, r'q_proj.*need \(8, 16\)'),
  ('rank_pattern', [8], r'rank_pattern is \[8\]'),
  ('alpha_pattern', {r'layers\.2\..*': 0}, 'lora_alpha is 0'),
  ('lora_alpha', -1, 'lora_alpha is -1'),
  ('lora_alpha', float('nan'), 'lora_alpha is nan'),
  pytest.param('lora_alpha', 10**400, 'lora_alpha is 1000', id='huge alpha'),
  ('lora_alpha', '8', "lora_alpha is '8'"),
  ('lora_dropout', 1, 'lora_dropout is 1'),
]


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'target_modules': '.*q_proj'}, 'with a list of names only'),
    ({'layers_pattern': 3}, 'layers_pattern is 3'),
    ({'layers_pattern': ['h']}, 'leaves no module'),
  ],
)
def test_layers_to_transform_needs_names_and_their_pattern(
  foreign_folder, adapted, fields, named
):
  change_fields(foreign_folder, layers_to_transform=[0], **fields)
  with pytest.raises(AdapterError, match=named):
    load_adapter(foreign_folder, adapted.config)


@pytest.mark.parametrize(('field', 'value', 'named'), REFUSED_FIELDS)
def test_a_config_that_means_something_else_is_refused(
  foreign_folder, adapted, field, value, named
):
  change_fields(foreign_folder, **{field: value})
  with pytest.raises(AdapterError, match=named) as error:
    load_adapter(foreign_folder, adapted.config)
  assert str(foreign_folder) in str(error.value)
