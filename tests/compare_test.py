import json
import pathlib

import pytest

CONFIG = pathlib.Path(__file__).parents[1] / 'experiments' / 'compare.py'
PLENTY = 10  # seconds; what can be known before loading takes one when quiet


@pytest.fixture(scope='module')
def flags(tiny_base, tiny_data, tmp_path_factory):
  """Flags of a comparison on the tiny base that takes two steps an arm."""
  fields = {
    'run.base': tiny_base,
    'run.data.train': tiny_data,
    'run.data.max_length': 64,
    'run.eval.max_new_tokens': 4,
    'run.eval.samples': 1,
    'run.data.eval_examples': 4,
    'run.train.steps': 2,
  }
  workdir = tmp_path_factory.mktemp('compared') / 'all'
  return (
    f'--config={CONFIG}',
    f'--workdir={workdir}',
    '--quick',
    *(f'--config.{name}={value}' for name, value in fields.items()),
  )


@pytest.fixture(scope='module')
def compared(commands, flags):
  ended = commands.run('compare', *flags)
  assert ended.rc == 0, ended.stderr
  return pathlib.Path(flags[1].removeprefix('--workdir=')), ended


def test_all_three_arms_are_in_the_report(compared):
  root, ended = compared
  report = (root / 'report.md').read_text()
  header = '|  | full | LoRA | QLoRA |'
  assert header in report
  assert header in ended.stdout
  assert '## When to use which' in report
  for name in ('memory.png', 'loss.png'):
    assert (root / name).read_bytes().startswith(b'\x89PNG\r\n')


def test_bytes_equal_their_formulas(compared):
  root, _ = compared
  record = json.loads((root / 'comparison.json').read_text())
  full, lora, qlora = (
    record['arms'][name]['runs'][0]['bytes']
    for name in ('full', 'lora', 'qlora')
  )
  whole = 4 * record['parameters']
  assert full['base'] == 0
  assert full['trained'] == full['gradients'] == lora['base'] == whole
  assert lora['trained'] == qlora['trained'] == qlora['gradients']
  assert qlora['base'] < whole / 2
  for parts in (full, lora, qlora):  # two moments, and a few counters
    assert 0 <= parts['optimizer'] - 2 * parts['trained'] < 64


def test_adapters_start_from_the_base_of_full_fine_tuning(compared):
  root, _ = compared
  record = json.loads((root / 'comparison.json').read_text())
  before = {
    name: arm['runs'][0]['base_model']['eval_loss']
    for name, arm in record['arms'].items()
  }
  assert before['full'] == pytest.approx(before['lora'], rel=1e-6)
  assert before['qlora'] != before['lora']


def test_the_same_command_again_trains_nothing(compared, commands, flags):
  root, first = compared
  record = (root / 'comparison.json').read_text()
  again = commands.run('compare', *flags)
  assert again.rc == 0, again.stderr
  assert again.stdout.count('done before') == 3
  assert 'step 2/2' in first.stdout
  assert 'step 2/2' not in again.stdout
  assert (root / 'comparison.json').read_text() == record


@pytest.mark.parametrize(
  ('wrong', 'said'),
  [
    ('--config.run.lora.rank=0', "arm 'full': lora.rank is 0"),
    ('--config.run.base=no/such/folder', "'no/such/folder'"),
    ('--config.run.data.train=no.jsonl', 'no.jsonl'),
    ('--config.arms.lora.optim.learning_rate=-1.0', "arm 'lora': optim"),
    ('--config.seeds=(1,1)', 'seeds are (1, 1)'),
    ('--workdir=/dev/null/x', '/dev/null/x'),
    ('--config.run.train.steps=3', 'train.steps'),
    ('--config.run.train.stepz=3', "no field 'stepz'; did you mean 'steps'"),
    ('--fast', 'fast'),
  ],
)
def test_bad_input_is_refused_in_one_sentence(
  compared, commands, flags, wrong, said
):
  flags = [flag for flag in flags if flag.split('=')[0] != wrong.split('=')[0]]
  ended = commands.run('compare', *flags, wrong)
  assert ended.rc == 2, ended.stderr
  assert ended.stderr.startswith('jlora: ')
  assert ended.stderr.count('\n') == 1
  assert said in ended.stderr
  assert ended.seconds < PLENTY


def test_another_experiment_is_refused(commands):
  qlora = CONFIG.with_name('qlora.py')
  ended = commands.run('compare', f'--config={qlora}')
  assert ended.rc == 2
  assert 'see experiments/compare.py' in ended.stderr


def test_a_missing_config_is_named(commands):
  ended = commands.run('compare')
  assert ended.rc == 2
  assert '--config=experiments/compare.py' in ended.stderr
