import importlib.util
import math
import pathlib
import sys

import pytest

from jlora import config
from jlora.errors import ConfigError, DataError

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
SMALLEST = {'data': {'train': 'my.jsonl'}, 'train': {'steps': 3}}


def resolve(**sections):
  """Resolves the smallest config, changed in some fields."""
  fields = {name: dict(section) for name, section in SMALLEST.items()}
  for name, changes in sections.items():
    if isinstance(changes, dict):
      fields[name] = fields.get(name, {}) | changes
    else:
      fields[name] = changes
  return config.resolve(fields)


def get_config(path):
  sys.path.insert(0, str(EXPERIMENTS.parent))
  try:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
  finally:
    sys.path.pop(0)


def runs():
  """Every experiment that describes one run."""
  found = sorted(EXPERIMENTS.glob('*.py'))
  return [path for path in found if path.stem != 'compare']


@pytest.mark.parametrize('path', runs(), ids=lambda path: path.stem)
def test_every_experiment_resolves(path):
  spec = config.resolve(get_config(path))
  assert config.from_json(spec.to_json()) == spec


def test_methods_differ_in_what_they_name():
  specs = {path.stem: config.resolve(get_config(path)) for path in runs()}
  assert specs['qlora'].quant is not None
  assert specs['lora'].quant is None
  assert specs['full'].lora.targets == ()
  assert specs['full'].lora.train_full == ('.*',)
  assert not specs['full'].is_adapter
  assert specs['qlora'].is_adapter


def test_defaults_fill_what_is_not_said():
  spec = resolve()
  assert spec.base == config.DEFAULT_BASE
  assert (spec.quant, spec.seed) == (None, 0)
  assert spec.lora.rank == 16
  assert resolve(quant={'block_size': 32}).quant.double_quant


def test_a_default_config_cannot_grow_fields():
  with pytest.raises(AttributeError):
    config.default_config().lora.rnk = 3


def test_the_json_form_keeps_every_field():
  spec = resolve(
    seed=7,
    quant={'exclude': ['a.*'], 'dtype': 'bfloat16'},
    lora={'targets': ['mlp', 'attention'], 'axes': {'a': 'in -> out'}},
    train={'steps': None, 'epochs': 1.5},
    eval={'merge': True},
  )
  text = spec.to_json()
  assert config.from_json(text) == spec
  assert config.from_json(text).to_json() == text


def test_json_keys_are_sorted():
  names = [
    line.split('"')[1]
    for line in resolve().to_json().splitlines()
    if line.startswith('  "')
  ]
  assert names == sorted(names)
  assert len(names) == 10


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ({'lora': {'rnk': 8}}, r"config.lora has no field 'rnk'.*'rank'"),
    ({'lor': {}}, r"config has no field 'lor'.*'lora'"),
    ({'optim': {'lr': 1e-3}}, r"config.optim has no field 'lr'"),
    ({'train': {'batchsize': 1}}, r"'batchsize'.*'batch_size'"),
    ({'lora': 8}, 'config.lora is 8; it is a section'),
  ],
)
def test_an_unknown_field_is_named_with_a_close_one(sections, message):
  with pytest.raises(ConfigError, match=message):
    resolve(**sections)


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ({'lora': {'rank': 'many'}}, "config.lora.rank is 'many'; it takes int"),
    ({'lora': {'rank': 1.5}}, 'config.lora.rank is 1.5'),
    ({'lora': {'rank': True}}, 'config.lora.rank is True'),
    ({'lora': {'rank': math.nan}}, 'config.lora.rank is nan'),
    ({'lora': {'rank': math.inf}}, 'config.lora.rank is inf'),
    ({'train': {'steps': math.inf}}, 'config.train.steps is inf'),
    ({'lora': {'alpha': '32'}}, "config.lora.alpha is '32'; it takes float"),
    ({'data': {'pack': 1}}, 'config.data.pack is 1; it takes bool'),
    ({'eval': {'merge': 1}}, 'config.eval.merge is 1; it takes bool'),
    ({'data': {'pack': 'yes'}}, "config.data.pack is 'yes'"),
    ({'data': {'train': 3}}, 'config.data.train is 3; it takes a name, a list'),
    ({'lora': {'targets': 3}}, 'config.lora.targets is 3'),
    ({'seed': 'x'}, "config.seed is 'x'; it takes int"),
    ({'base': 3}, 'config.base is 3; it takes str'),
  ],
)
def test_a_value_of_the_wrong_type_is_refused(sections, message):
  with pytest.raises(ConfigError, match=message):
    resolve(**sections)


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ({'lora': {'rank': 0}}, 'lora.rank is 0'),
    ({'lora': {'alpha': -1.0}}, 'lora.alpha is -1'),
    ({'lora': {'dropout': 1.0}}, 'lora.dropout is 1'),
    ({'optim': {'learning_rate': math.nan}}, 'optim.learning_rate is nan'),
    ({'optim': {'schedule': 'linear'}}, "'linear' is none of 'constant'"),
    ({'quant': {'format': 'nf5'}}, "quant.format 'nf5' is none of 'nf4'"),
    ({'quant': {'block_size': 7}}, 'quant.block_size is 7'),
    ({'quant': {'dtype': 'float99'}}, "quant.dtype 'float99'"),
    ({'train': {'batch_size': 0}}, 'train.batch_size is 0'),
    ({'train': {'accumulate': 3}}, '4 cannot be cut into train.accumulate=3'),
    ({'train': {'epochs': 1.0}}, 'steps is 3 and train.epochs is 1.0'),
    ({'train': {'steps': None}}, 'steps is None and train.epochs is None'),
    ({'train': {'steps': -1}}, 'steps or epochs is -1'),
    ({'train': {'remat': 'some'}}, "train.remat 'some' is none of"),
    ({'train': {'dtype': 'float16'}}, "train.dtype 'float16' is none of"),
    ({'data': {'train': ''}}, 'data.train is empty'),
    ({'data': {'max_length': 1}}, 'data.max_length is 1'),
    ({'data': {'learn': 'some'}}, "data.learn 'some' is none of"),
    ({'data': {'thinking': 'no'}}, "data.thinking 'no' is none of"),
    ({'data': {'too_long': 'trim'}}, "data.too_long 'trim' is none of"),
    ({'data': {'shuffle_buffer': 0}}, 'data.shuffle_buffer is 0'),
    (
      {'data': {'stream': True, 'shuffle_buffer': 3}},
      'shuffle_buffer is 3, fewer examples than the 4 rows',
    ),
    (
      {'data': {'stream': True}, 'train': {'steps': None, 'epochs': 1.0}},
      'train.epochs is 1.0, but with data.stream nobody knows',
    ),
    ({'data': {'columns': {'ask': 'q'}}}, "reads 'q' as 'ask'"),
    ({'data': {'columns': 'prompt'}}, "data.columns is 'prompt'"),
    (
      {'data': {'columns': {'a.csv': {'text': 'b'}}}},
      "names the source 'a.csv', which is none of .*my.jsonl",
    ),
    ({'eval': {'every': 0}}, 'eval.every is 0'),
    ({'log': {'every': 0}}, 'log.every is 0'),
  ],
)
def test_what_cannot_be_is_refused_with_its_value(sections, message):
  with pytest.raises(ConfigError, match=message):
    resolve(**sections)


def test_every_source_is_checked(tmp_path):
  there = tmp_path / 'a.jsonl'
  there.write_text('{"text": "a"}')
  spec = resolve(data={'train': [str(there), 'no.csv']})
  with pytest.raises(DataError, match=r"'no\.csv' does not exist"):
    config.check_sources(spec)
  spec = resolve(data={'train': [str(there), 'reasoning_gym:gcd']})
  with pytest.raises(ConfigError, match=r'gcd.* set data\.train_examples'):
    config.check_sources(spec)


def test_valid_files_of_a_folder_are_checked(tmp_path):
  for name in ('train', 'valid'):
    (tmp_path / f'{name}.jsonl').write_text('{"text": "a"}\n')
  spec = resolve(data={'train': str(tmp_path)})
  config.check_sources(spec)
  (tmp_path / 'valid.jsonl').write_bytes(b'{"text": "a"}\n\xe9')
  with pytest.raises(DataError, match=r'valid\.jsonl:2: byte 0xe9'):
    config.check_sources(spec)


def test_data_without_a_source_says_what_to_set():
  with pytest.raises(ConfigError, match=r'config\.data lacks train'):
    config.resolve({'train': {'steps': 3}})


@pytest.mark.parametrize(
  ('text', 'targets'),
  [
    ("('mlp', 'attention')", ('mlp', 'attention')),
    ("['.*/kernel']", ('.*/kernel',)),
    ('(up|down)/kernel', ('(up|down)/kernel',)),
    ('all-linear', 'all-linear'),
    ('()', ()),
  ],
)
def test_targets_from_the_command_line(text, targets):
  train_full = '.*' if targets == () else ()
  spec = resolve(lora={'targets': text, 'train_full': train_full})
  assert spec.lora.targets == targets


@pytest.mark.parametrize(
  'value',
  [
    "{'layers/[0-9]/.*': 8, '.*/kernel': 4}",
    "[('layers/[0-9]/.*', 8), ('.*/kernel', 4)]",
    {'layers/[0-9]/.*': 8, '.*/kernel': 4},
  ],
  ids=['dict', 'pairs', 'experiment'],
)
def test_values_by_pattern_keep_their_order(value):
  spec = resolve(lora={'rank_pattern': value})
  assert spec.lora.rank_pattern == (('layers/[0-9]/.*', 8), ('.*/kernel', 4))


@pytest.mark.parametrize(
  'value', ["{'a.jsonl': 3, 'b': 1}", {'a.jsonl': 3, 'b': 1}]
)
def test_sources_are_pairs_however_they_are_given(value):
  spec = resolve(data={'train': value})
  assert spec.data.sources == spec.data.train == (('a.jsonl', 3), ('b', 1))
  assert config.from_json(spec.to_json()) == spec
  assert resolve().data.sources == (('my.jsonl', None),)


@pytest.mark.parametrize(
  'value', ["{'prompt': 'q'}", {'prompt': 'q'}, [['prompt', 'q']]]
)
def test_columns_are_pairs_however_they_are_given(value):
  spec = resolve(data={'columns': value})
  assert spec.data.columns == (('prompt', 'q'),)
  assert config.from_json(spec.to_json()) == spec


def test_fields_of_the_template_are_pairs():
  spec = resolve(data={'template': "{'enable_thinking': False}"})
  assert spec.data.template == (('enable_thinking', False),)
  assert config.from_json(spec.to_json()) == spec


@pytest.mark.parametrize('text', ["{'x'", '{[1]: 2}', "{'x'}", '[' * 500])
def test_what_is_no_dict_says_how_to_write_one(text):
  with pytest.raises(ConfigError, match=r"such as {'NAME': VALUE}$"):
    resolve(lora={'rank_pattern': text})


def test_text_may_begin_with_a_bracket():
  name = '{x}.jsonl'
  assert resolve(data={'train': name}).data.train == name


def test_loftq_needs_quantization():
  with pytest.raises(ConfigError, match=r"'loftq' .* quant is None"):
    resolve(lora={'init': 'loftq'})
  assert resolve(lora={'init': 'loftq'}, quant={}).quant is not None


def test_whole_numbers_are_fine_where_a_float_is_due():
  spec = resolve(lora={'alpha': 8, 'rank': 4.0}, optim={'learning_rate': 1})
  assert (spec.lora.alpha, type(spec.lora.alpha)) == (8.0, float)
  assert (spec.lora.rank, type(spec.lora.rank)) == (4, int)
