"""A contest from its flags to its file, with processes that only pretend."""

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks.harness import doors, models, processes, results
from experiments.benchmarks.harness.contest import Contest
from experiments.benchmarks.harness.processes import ArmError
from jlora.errors import ConfigError

SIZES = {
  **dict.fromkeys(('embed', 'mlp', 'head_dim'), 64),
  **dict.fromkeys(('layers', 'heads', 'kv_heads'), 1),
  'vocab': 96,
}
SECONDS = {'none': 3.0, 'dots': 2.0, 'full': 4.0}


def pretend(arm, _):
  """Answers as an arm would whose time depends on its policy alone."""
  if arm.module.endswith('matmul'):
    return {'arm': arm.name, 'cold': True, 'flops_per_s': 1e6}
  if arm.module.endswith('qwix'):
    raise ArmError(f'{arm.name} is left out')
  seconds = SECONDS[arm.work['remat']]
  tokens = arm.work['batch'] * arm.work['length']
  return {
    'arm': arm.name,
    'cold': True,
    'remat': arm.work['remat'],
    'step_s': seconds,
    'tokens_per_s': tokens / seconds,
    'loss': 3.1 if arm.module.endswith('bare') else 3.0,
  }


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs a contest with flags and fields, and returns its result."""
  path = tmp_path / 'result.json'
  count = iter(range(9))

  def run(*given, answer=pretend, **fields):
    monkeypatch.setattr(processes, 'run', answer)
    folder = tmp_path / str(next(count))
    folder.mkdir()
    contest = Contest(
      **{
        'folder': folder,
        'model': models.Model(None, models.make_config(SIZES)),
        'label': 'tiny',
        'peers': (),
        'doubled': (),
        'method': 'lora',
        'remat': 'best',
        'batch': 2,
        'length': 8,
        'rank': 2,
        'steps': 1,
        **fields,
      }
    )
    flags.FLAGS(['test', f'--out={path}', *given])
    contest.run()
    return results.load(path)

  with flagsaver.flagsaver():
    yield run


def test_each_arm_runs_with_its_fastest_policy(run):
  result = run('--rounds=2', peers=('peft', 'bare'))
  summary = result['summary']
  remat = {arm: summary[arm]['remat'] for arm in ('jlora', 'peft', 'bare')}
  assert remat == {'jlora': 'dots', 'peft': 'none', 'bare': 'dots'}
  assert summary['peft']['speed'] == 3 / 2
  assert summary['jlora']['rounds'] == 2
  assert result['tried']['peft full'] == 16 / 4
  assert result['failures'] == {
    'bare': (
      'bare computes something else: its first loss is 3.10000, and ours'
      ' 3.00000'
    )
  }


def test_a_peer_can_be_held_to_a_policy(run):
  result = run('--rounds=1', peers=('peft', 'peft:full', 'bare:none'))
  speeds = {
    arm: result['summary'][arm]['speed']
    for arm in result['summary']
    if 'speed' in result['summary'][arm]
  }
  assert speeds == {'peft': 3 / 2, 'peft:full': 2, 'bare:none': 3 / 2}
  assert 'share' in result['summary']['peft:full']
  assert result['failures'].keys() == {'bare:none'}
  assert not any('peft:full' in name for name in result['tried'])


def test_qlora_is_compared_with_lora(run):
  methods = []

  def note(arm, limits):
    methods.append(arm.work.get('method'))
    loss = {'loss': 9.0} if methods[-1] == 'lora' else {}
    return {**pretend(arm, limits), **loss}

  result = run(
    '--rounds=1', answer=note, method='qlora', remat='full', peers=('lora',)
  )
  assert methods == ['qlora', 'lora', None]
  assert result['summary']['lora']['speed'] == 1
  assert not result['failures']


def test_the_share_is_that_of_the_rate_of_products(run):
  share = run('--rounds=1')['summary']['jlora']['share']
  weights = 4 * (64 * 64 * 7) + 6 * 2 * 7 * 128
  needed = 16 * (weights + 4 * 64 * 96 + 12 * 8 * 64)
  assert share == pytest.approx(needed / 2 / 1e6)


def test_added_rounds_keep_the_policy_that_was_chosen(run):
  run('--rounds=1')
  result = run('--rounds=1', '--add')
  assert [r['round'] for r in result['records']] == [0, 0, 1, 1]
  assert len(result['tried']) == 3


def test_an_arm_that_cannot_run_is_said_and_the_others_go_on(run):
  result = run('--rounds=1', peers=('qwix', 'peft'))
  assert result['failures'] == {'qwix': 'qwix is left out'}
  assert 'peft' in result['summary']


def test_doubled_sizes_are_arms_of_their_own(run):
  result = run('--rounds=1', remat='full', doubled=('length', 'layers'))
  summary = result['summary']
  assert summary['jlora, length ×2']['speed'] == 0.5
  assert summary['jlora, layers ×2']['time'] == 1.0


def test_a_policy_that_a_peer_does_not_have_is_refused(run):
  with pytest.raises(ConfigError, match='peft has none, full only'):
    run(remat='dots', peers=('peft',))


def test_names_of_files_hold_nothing_but_letters_and_digits(run):
  run('--rounds=1')
  flags.FLAGS.out = None
  benchmark = doors.Benchmark('a', 'step-layers=2,x/y', 'ours', (), {})
  assert benchmark.path.name == 'step-layers-2-x-y.json'
