import pytest

from experiments import compare, full, lora, qlora
from jlora import arms, config
from jlora.errors import ConfigError


def fields(**changes):
  return arms.merged(
    {
      'run': {'data': {'train': 'a.jsonl'}, 'train': {'steps': 9}},
      'arms': {'lora': {}, 'qlora': {'quant': {}}},
    },
    changes,
  )


@pytest.mark.parametrize(
  ('name', 'experiment'), [('full', full), ('lora', lora), ('qlora', qlora)]
)
def test_the_arms_are_the_experiments(name, experiment):
  spec = arms.resolve(compare.get_config().to_dict(), quick=False)
  alone = config.resolve(experiment.get_config())
  arm = spec.arms[name]
  assert (arm.lora, arm.quant, arm.optim) == (
    alone.lora,
    alone.quant,
    alone.optim,
  )
  assert (arm.base, arm.data) == (alone.base, alone.data)


def test_quick_changes_what_it_names():
  given = compare.get_config().to_dict()
  slow, quick = (arms.resolve(given, quick=q) for q in (False, True))
  assert (len(slow.seeds), slow.timing_rounds) == (3, 3)
  assert (len(quick.seeds), quick.timing_rounds) == (1, 0)
  assert {arm.train.steps for arm in quick.arms.values()} == {40}
  assert quick.arms['full'].optim == slow.arms['full'].optim


def test_quick_leaves_what_the_user_set():
  given = fields(quick={'run': {'train': {'steps': 4, 'remat': 'none'}}})
  spec = arms.resolve(given, quick=True, given=('run.train.steps', 'grid'))
  assert {arm.train.steps for arm in spec.arms.values()} == {9}
  assert {arm.train.remat for arm in spec.arms.values()} == {'none'}


def test_a_change_replaces_what_is_no_section():
  merged = arms.merged(
    {'a': {'b': 1, 'c': 2}, 'quant': {'x': 1}}, {'a': {'b': 3}, 'quant': None}
  )
  assert merged == {'a': {'b': 3, 'c': 2}, 'quant': None}


def test_a_shared_field_reaches_every_arm():
  spec = arms.resolve(fields(run={'train': {'steps': 7}}), quick=False)
  assert [arm.train.steps for arm in spec.arms.values()] == [7, 7]


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'sedes': (1,)}, "no field 'sedes'"),
    ({'timing': {'round': 1}}, "config.timing .* no field 'round'"),
    ({'timing': {'rounds': 1.5}}, r'timing.rounds holds 1\.5'),
    ({'quick': {'steps': 1}}, "config.quick .* no field 'steps'"),
    ({'seeds': 3}, 'seeds is 3; it takes a tuple'),
    ({'seeds': (0.5,)}, r'seeds holds 0\.5'),
    ({'grid': ('1',)}, "grid holds '1'"),
    ({'arms': {'lora': {'lora': {'rank': 0}}}}, "arm 'lora': lora.rank is 0"),
    ({'arms': {'lora': {'lore': {}}}}, "arm 'lora': .*'lore'"),
    ({'arms': None}, 'no `run` or no `arms`'),
    ({'arms': 3}, 'config.arms is 3'),
    ({'arms': {'lora': 3}}, r'config.arms.lora is 3'),
    ({'run': 3}, 'config.run is 3'),
  ],
)
def test_a_wrong_field_is_refused_with_its_value(changes, said):
  with pytest.raises(ConfigError, match=said):
    arms.resolve(fields(**changes), quick=True)
