import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from jlora import config
from jlora.comparison import tasks
from jlora.comparison.compare import compare
from jlora.comparison.record import read_run
from jlora.comparison.spec import ComparisonSpec
from jlora.comparison.workers import WorkerError
from jlora.errors import ConfigError

PARTS = {
  'frozen, quantized': 100,
  'frozen, dense': 30,
  'trainable': 7,
  'optimizer state': 15,
}


def make_arm(base='tiny', **sections):
  fields = {
    'base': str(base),
    'data': {'train': 'a.jsonl', 'max_length': 16},
    'train': {'steps': 3},
    'optim': {'learning_rate': 0.5},
  }
  return config.resolve({**fields, **sections})


def make_spec(base='tiny', **fields):
  arms = {'lora': make_arm(base), 'qlora': make_arm(base, quant={})}
  return ComparisonSpec(arms=arms, **fields)


class Trainer:
  """Stands in for training: writes a run folder at once."""

  def __init__(self):
    self.runs = []
    self.fail = {}  # folder name: error
    self.stop_at = None
    self.loss = lambda spec: 1.0
    self.changes = {}  # folder name: fields of its summary

  def __call__(self, spec, folder):
    self.runs.append((folder.name, spec))
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name in self.fail:
      raise self.fail[folder.name]
    if folder.name == self.stop_at:
      return False
    for name in ('checkpoints', 'best', 'adapter'):
      (folder / name).mkdir()
    (folder / 'adapter' / 'a.safetensors').write_bytes(b'12345')
    scores = {'eval_loss': self.loss(spec)}
    lines = [{'step': 0, 'eval_loss': 9.0}]
    for step in (1, 2, 3):
      lines.append({'step': step, 'loss': 1.0, 'step_seconds': 2.0 * step})
    lines += [{'step': 3, 'eval_loss': None}, {'step': 3, **scores}]
    summary = {
      'base_model': {'eval_loss': 9.0},
      'bytes': PARTS,
      'compiled_peak_bytes': 200,
      'data_digest': f'digest {spec.seed}',
      'process_peak_bytes': 300,
      'skipped_updates': 0,
      'steps': 3,
      'trainable_params': 5,
      'trained_tokens': 40,
      'tuned_model': scores,
      'versions': {'jax': '1', 'backend': 'cpu'},
      **self.changes.get(folder.name, {}),
    }
    (folder / 'config.json').write_text(spec.to_json())
    (folder / 'summary.json').write_text(json.dumps(summary))
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    return True

  @property
  def names(self):
    return [name for name, _ in self.runs]


@pytest.fixture
def trainer(monkeypatch):
  trainer = Trainer()
  monkeypatch.setattr(tasks, 'train_apart', trainer)
  return trainer


@pytest.fixture
def run(tiny_base, tmp_path, trainer):
  """Compares into `tmp_path`; the fields are those of ComparisonSpec."""

  def run_comparison(**fields):
    spec = fields.pop('spec', None) or make_spec(tiny_base, **fields)
    console = Console(file=io.StringIO())
    return compare(spec, tmp_path, console, command='compare')

  return run_comparison


def test_every_seed_and_arm_is_run_once_in_turn(run, trainer):
  assert run(seeds=(4, 2))
  assert trainer.names == [
    'lora-seed4',
    'qlora-seed4',
    'lora-seed2',
    'qlora-seed2',
  ]
  assert [spec.seed for _, spec in trainer.runs] == [4, 4, 2, 2]


def test_the_same_command_again_runs_what_is_missing(run, trainer, tmp_path):
  trainer.stop_at = 'qlora-seed0'
  assert not run()
  assert not (tmp_path / 'comparison.json').exists()
  trainer.stop_at = None
  trainer.runs.clear()
  assert run()
  assert trainer.names == ['qlora-seed0']
  assert (tmp_path / 'report.md').exists()


def test_every_step_is_in_the_metrics(run, trainer, tiny_base):
  arms = {
    name: dataclasses.replace(arm, log=config.LogSpec(every=7))
    for name, arm in make_spec(tiny_base).arms.items()
  }
  run(spec=ComparisonSpec(arms=arms))
  assert {spec.log.every for _, spec in trainer.runs} == {1}


def test_rounds_take_turns_and_keep_only_numbers(run, trainer, tmp_path):
  run(timing_rounds=2, timing_steps=4)
  assert trainer.names[2:] == [
    'lora-round0',
    'qlora-round0',
    'lora-round1',
    'qlora-round1',
  ]
  assert {spec.train.steps for _, spec in trainer.runs[2:]} == {4}
  timed = tmp_path / 'timing' / 'lora-round0'
  assert {path.name for path in timed.iterdir()} == {
    'config.json',
    'metrics.jsonl',
    'summary.json',
  }
  record = json.loads((tmp_path / 'comparison.json').read_text())
  assert record['arms']['lora']['timing'] == [[2.0, 4.0, 6.0]] * 2


def test_runs_keep_what_they_trained_without_checkpoints(run, tmp_path):
  run()
  found = {path.name for path in (tmp_path / 'lora-seed0').iterdir()}
  assert {'adapter', 'best'} < found
  assert 'checkpoints' not in found


def test_the_grid_chooses_a_rate_for_each_arm(run, trainer, tmp_path):
  def loss(spec):
    best = 1.0 if spec.quant else 0.05
    return abs(spec.optim.learning_rate - best) + 1

  trainer.loss = loss
  run(grid=(0.1, 2.0))
  rates = {
    name: spec.optim.learning_rate
    for name, spec in trainer.runs
    if 'seed' in name
  }
  assert rates == {'lora-seed0': 0.05, 'qlora-seed0': 1.0}
  record = json.loads((tmp_path / 'comparison.json').read_text())
  assert record['grid']['lora'] == [[0.05, 1.0], [1.0, 1.95]]


def test_a_rate_of_the_grid_may_diverge(run, trainer, tmp_path):
  trainer.fail['lora-1'] = WorkerError('the loss is not finite', 3)
  assert run(grid=(0.1, 2.0))
  record = json.loads((tmp_path / 'comparison.json').read_text())
  assert record['grid']['lora'] == [[0.05, 1.0], [1.0, None]]


def test_a_grid_that_diverges_everywhere_is_refused(run, trainer):
  trainer.fail['lora-1'] = WorkerError('the loss is not finite', 3)
  with pytest.raises(ConfigError, match=r"'lora' failed .* \(1\); lower it"):
    run(grid=(2.0,))


def test_a_run_that_fails_ends_the_comparison(run, trainer):
  trainer.fail['lora-seed0'] = WorkerError('the loss is not finite', 3)
  with pytest.raises(WorkerError):
    run()


def test_another_run_in_the_folder_is_refused_before_training(run, trainer):
  run()
  trainer.runs.clear()
  with pytest.raises(ConfigError, match='holds a run with'):
    run(spec=make_spec('other'))
  assert trainer.runs == []


@pytest.mark.parametrize(
  'change', [{'data_digest': 'x'}, {'steps': 2}, {'versions': {'jax': '2'}}]
)
def test_runs_that_are_not_alike_are_refused(run, trainer, change):
  trainer.changes['qlora-seed0'] = change
  with pytest.raises(
    ConfigError, match=f'with seed 0, {next(iter(change))} is'
  ):
    run()


def test_a_loss_that_is_not_finite_is_refused(run, trainer):
  trainer.loss = lambda spec: None
  with pytest.raises(ConfigError, match=r'learning_rate=0\.5; lower it'):
    run()


def test_a_run_is_read_from_its_folder(trainer, tmp_path):
  spec = make_arm(seed=3)
  trainer(spec, tmp_path / 'run')
  found = read_run(tmp_path / 'run', spec)
  assert found['bytes'] == {
    'base': 130,
    'trained': 7,
    'gradients': 7,
    'optimizer': 15,
  }
  assert found['file_bytes'] == 5
  assert found['step_seconds'] == [2.0, 4.0, 6.0]
  assert found['held_out'] == [
    {'step': 0, 'seconds': 0.0, 'loss': 9.0},
    {'step': 3, 'seconds': 12.0, 'loss': 1.0},
  ]


def test_the_record_names_what_differs_and_what_is_shared(run, tmp_path):
  run()
  record = json.loads((tmp_path / 'comparison.json').read_text())
  assert record['order'] == ['lora', 'qlora']
  assert record['arms']['lora']['fields'] == {'quant': None}
  assert record['arms']['qlora']['fields'] == {
    'quant': 'block_size=64, double_quant=True, format=nf4'
  }
  assert record['shared']['optim.learning_rate'] == 0.5
  assert record['base'].endswith('base = float32')
  assert record['machine']['cores'] >= 1


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'arms': {'lora': make_arm()}}, r"\['lora'\]; .* two or more"),
    ({'arms': {'a/b': make_arm(), 'c': make_arm()}}, "'a/b' names folders"),
    ({'seeds': ()}, r'seeds are \(\)'),
    ({'seeds': (1, 1)}, r'seeds are \(1, 1\)'),
    ({'grid': (0.0,)}, r'grid is \(0\.0,\)'),
    ({'timing_rounds': -1}, r'timing\.rounds is -1'),
    ({'timing_steps': 1}, r'timing\.steps 1'),
  ],
)
def test_impossible_comparisons_are_refused(fields, said):
  arms = make_spec().arms
  with pytest.raises(ConfigError, match=said):
    ComparisonSpec(**{'arms': arms, **fields})


@pytest.mark.parametrize(
  ('section', 'field'),
  [
    ({'data': {'train': 'b.jsonl', 'max_length': 16}}, 'data.train'),
    ({'train': {'steps': 4}}, 'train.steps'),
    ({'train': {'steps': 3, 'remat': 'none'}}, 'train.remat'),
    ({'optim': {'learning_rate': 0.5, 'warmup': 1}}, 'optim.warmup'),
    ({'seed': 1}, 'seed'),
  ],
)
def test_unequal_budgets_are_refused(section, field):
  with pytest.raises(ConfigError, match=re.escape(f"'one' has {field}=")):
    ComparisonSpec(arms={'one': make_arm(), 'other': make_arm(**section)})


def test_arms_may_differ_in_method_and_learning_rate():
  other = make_arm(quant={}, lora={'rank': 4}, optim={'learning_rate': 0.25})
  assert ComparisonSpec(arms={'one': make_arm(), 'other': other})
