"""The command `python -m jlora.plan`."""

import json

import pytest

EXPERIMENT = 'experiments/qlora.py'


@pytest.fixture(scope='module')
def config_json(tiny_base, tmp_path_factory):
  """The sizes of the tiny base, for longer rows, without its weights."""
  fields = json.loads((tiny_base / 'config.json').read_text())
  path = tmp_path_factory.mktemp('sizes') / 'config.json'
  path.write_text(json.dumps(fields | {'max_position_embeddings': 512}))
  return path


def plan(commands, *flags):
  return commands.run('plan', f'--config={EXPERIMENT}', *flags)


def test_a_config_alone_is_planned_for_this_cpu(
  commands, config_json, tmp_path
):
  ended = plan(
    commands,
    f'--config.base={config_json}',
    '--target=cpu',
    '--config.lora.rank=4',
    '--nosearch',
    f'--out={tmp_path}',
  )
  assert ended.rc == 0, ended.stderr
  assert 'compiled peak' in ended.stdout
  (record,) = json.loads((tmp_path / 'plan.json').read_text())
  assert record['compiled']
  assert record['fits']
  assert record['config']['lora']['rank'] == 4
  assert sum(record['bytes'].values()) == record['peak']


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (('--target=b7000',), "target 'b7000' is not known; use cpu, a100-40"),
    ((), '--target is missing'),
    (('--target=v5e-3',), 'no slice of v5e'),
    (('--target=cpu', '--config.base=no/config.json'), 'does not exist'),
    (('--target=cpu', '--config.lora.rnk=4'), 'rank'),
    (('--target=cpu-99', '--config.base={}'), 'device_count=99'),
    (('--target=cpu', '--config.base={}', '--config.data.max_length=4096'),
     'trained for 512 positions'),
    (('--target=cpu', '--config.base={}', '--config.train.accumulate=3'),
     'cannot be cut'),
  ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(commands, config_json, flags, words):
  flags = [flag.format(config_json) for flag in flags]
  ended = plan(commands, *flags)
  assert ended.rc == 2, ended.stderr
  assert words in ended.stderr
  assert ended.stderr.count('\n') == 1
  assert ended.stdout == '' or ended.stdout.startswith('cpu')
