import copy
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from jlora.comparison.numbers import PARTS, read_arms, sampling_error
from jlora.comparison.report import markdown, write_report
from jlora.comparison.words import size

BASE = 538_060_032
ADAPTERS = 4_884_480
# rate, trained, base, peak, process, FLOPs, seconds, loss, exact match, file
ARMS = {
  'full': (1e-4, 134_515_008, 0, 3.25e9, 5.1e9, 1.127e12, 4.0, 0.6, 0.5, BASE),
  'lora': (1e-3, ADAPTERS, BASE, 8.4e8, 1.9e9, 8.3e11, 2.5, 0.61, 0.5, 2e7),
  'qlora': (1e-3, ADAPTERS, 1.68e8, 4.5e8, 1.5e9, 8.3e11, 2.5, 0.63, 0.48, 2e7),
}


def make_run(seed, values):
  _, trained, base, peak, process, _, seconds, loss, share, file = values
  scored = {'exact_match': 0.02, 'well_formed': 0.04, 'scored': 100}
  steps = [9 * seconds, *[seconds] * 19, 7 * seconds]
  after = {**scored, 'eval_loss': loss + 0.001 * seed, 'exact_match': share}
  return {
    'base_model': {**scored, 'eval_loss': 7.2},
    'bytes': {
      'base': int(base),
      'trained': 4 * trained,
      'gradients': 4 * trained,
      'optimizer': 8 * trained,
    },
    'compiled_peak_bytes': int(peak),
    'data_digest': 'd' * 64,
    'file_bytes': int(file),
    'held_out': [
      {'step': 10 * k, 'seconds': 10 * k * seconds, 'loss': loss + 6.6 * f}
      for k, f in enumerate((1, 0.2, 0.05, 0.01, 0))
    ],
    'process_peak_bytes': int(process),
    'seed': seed,
    'skipped_updates': 0,
    'step_seconds': steps,
    'steps': 40,
    'trainable_params': trained,
    'trained_tokens': 4000,
    'tuned_model': after,
  }


@pytest.fixture
def make_record():
  """A comparison in the shape of comparison.json, and near a real one."""

  def make(seeds=(0,), **changes):
    arms = {
      name: {
        'kind': name,
        'fields': {'optim.learning_rate': values[0], 'quant': None},
        'flops': values[5],
        'runs': [make_run(seed, values) for seed in seeds],
        'timing': [],
      }
      for name, values in copy.deepcopy(ARMS).items()
    }
    return {
      'arms': arms,
      'base': 'SmolLM2: llama, 134,515,008 parameters, base = dequantized Q4_1',
      'base_sha256': 'b' * 64,
      'command': 'python -m jlora.compare --quick',
      'grid': {},
      'machine': {'cores': 2, 'memory_bytes': 16 * 10**9},
      'order': ['full', 'lora', 'qlora'],
      'parameters': 134_515_008,
      'shared': {
        'data.train': 'reasoning_gym:family_relationships',
        'data.max_length': 256,
        'train.batch_size': 4,
      },
      'versions': {'backend': 'cpu', 'jax': '0.10.2'},
      **changes,
    }

  return make


def set_after(record, name, **values):
  for run in record['arms'][name]['runs']:
    run['tuned_model'].update(values)


def cells(report, row):
  lines = [line for line in report.splitlines() if line.startswith(f'| {row}')]
  assert len(lines) == 1
  return [cell.strip() for cell in lines[0].split('|')[2:-1]]


def test_report_and_figures_come_from_the_json_alone(make_record, tmp_path):
  text = json.dumps(make_record(seeds=(0, 1)))
  (tmp_path / 'comparison.json').write_text(text)
  write_report(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {
    'comparison.json',
    'loss.png',
    'memory.png',
    'report.md',
  }
  written = (tmp_path / 'report.md').read_text()
  assert written == markdown(json.loads(text))


def test_the_figures_show_every_arm(make_record, tmp_path):
  record = make_record()
  (tmp_path / 'comparison.json').write_text(json.dumps(record))
  write_report(tmp_path)
  whole = {
    name: imread(tmp_path / f'{name}.png') for name in ('loss', 'memory')
  }
  record['order'] = ['full', 'lora']
  (tmp_path / 'comparison.json').write_text(json.dumps(record))
  write_report(tmp_path)
  green = np.array([0x00, 0x9E, 0x73]) / 255  # of the third arm's curve
  two = imread(tmp_path / 'loss.png')
  assert np.isclose(whole['loss'][..., :3], green, atol=0.01).all(-1).any()
  assert not np.isclose(two[..., :3], green, atol=0.01).all(-1).any()
  assert len(imread(tmp_path / 'memory.png')) < len(whole['memory'])


def test_the_table_has_a_column_an_arm(make_record):
  report = markdown(make_record())
  assert cells(report, ' |') == ['full', 'LoRA', 'QLoRA']
  assert cells(report, 'frozen base') == ['0 B', '538.1 MB', '168.0 MB']
  assert cells(report, 'gradients') == ['538.1 MB', '19.5 MB', '19.5 MB']
  assert cells(report, 'GFLOPs') == [
    '1,127 (1.00×)',
    '830 (0.74×)',
    '830 (0.74×)',
  ]
  assert cells(report, '**exact') == ['2% → 50%', '2% → 50%', '2% → 48%']


def test_the_parts_add_up_to_the_compiled_peak(make_record):
  for arm in read_arms(make_record()):
    assert tuple(arm.bytes) == PARTS
    assert sum(arm.bytes.values()) == arm.compiled_peak


def test_the_first_step_does_not_count(make_record):
  record = make_record()
  record['arms']['full']['runs'][0]['step_seconds'] = [90.0, 1.0, 2.0, 4.0]
  assert read_arms(record)[0].step_seconds == 2.0


def test_rounds_in_turns_replace_the_times_of_the_runs(make_record):
  record = make_record()
  for arm in record['arms'].values():
    arm['timing'] = [[50.0, 1.0, 2.0], [50.0, 3.0, 5.0]]
  assert read_arms(record)[0].step_seconds == 2.5
  assert '2 rounds in which the arms took turns' in markdown(record)
  assert 'one arm after the other' in markdown(make_record())


def test_only_several_seeds_have_a_deviation(make_record):
  one, three = markdown(make_record()), markdown(make_record(seeds=(0, 1, 2)))
  assert cells(one, '**held-out loss')[0] == '0.600'
  assert cells(three, '**held-out loss')[0] == '0.601 ± 0.001'
  assert 'One seed gives no spread' in one
  assert 'One seed gives no spread' not in three


def test_what_chance_allows_is_two_standard_errors(make_record):
  arms = read_arms(make_record())[:2]  # both 50 % of 100
  assert sampling_error(arms) == pytest.approx(2 * math.sqrt(2 * 0.25 / 100))


@pytest.mark.parametrize(
  ('loss', 'said'),
  [
    (0.55, '**Use LoRA first:** its held-out loss is lower than that of full'),
    (0.61, '**Use LoRA first:** its held-out loss is that of full'),
    (0.70, '**Use full fine-tuning** where quality decides and 3.25 GB are'),
  ],
)
def test_the_advice_on_lora_follows_the_losses(make_record, loss, said):
  record = make_record()
  set_after(record, 'lora', eval_loss=loss)
  assert said in markdown(record)


@pytest.mark.parametrize(
  ('loss', 'said'),
  [
    (0.58, 'its held-out loss is even lower, by 0.030 nats'),
    (0.62, 'it costs no held-out loss to within 0.020 nats'),
    (0.64, "it takes 0.54 of LoRA's memory, and it costs 0.030 nats"),
  ],
)
def test_the_advice_on_qlora_follows_the_losses(make_record, loss, said):
  record = make_record()
  set_after(record, 'qlora', eval_loss=loss)
  assert said in markdown(record)


def test_four_bits_that_save_nothing_are_not_advised(make_record):
  record = make_record()
  record['arms']['qlora']['runs'][0]['compiled_peak_bytes'] = int(0.83e9)
  assert 'no reason to store the base in 4 bits' in markdown(record)


def test_seeds_that_scatter_widen_what_counts_as_equal(make_record):
  record = make_record(seeds=(0, 1, 2))
  for seed, run in enumerate(record['arms']['lora']['runs']):
    run['tuned_model']['eval_loss'] = 0.60 + 0.1 * seed
  assert 'is that of full fine-tuning to within 0.200 nats' in markdown(record)


def test_exact_match_that_disagrees_with_the_loss_is_told(make_record):
  record = make_record()
  assert 'more than chance' not in markdown(record)
  set_after(record, 'lora', exact_match=0.2)
  assert 'Its exact match is lower by 30 points' in markdown(record)


def test_the_base_is_said_to_be_dequantized(make_record):
  assert 'base = dequantized Q4_1' in markdown(make_record())


def test_what_a_cpu_hides_is_said_on_a_cpu_only(make_record):
  hidden = 'A CPU hides'
  assert hidden in markdown(make_record())
  gpu = markdown(make_record(versions={'backend': 'gpu'}))
  assert hidden not in gpu
  assert '| tokens a second | 1,650 | 3,083 | 2,413 |' in gpu


def test_data_without_a_verifier_has_no_exact_match(make_record):
  record = make_record()
  for arm in record['arms'].values():
    for name in ('base_model', 'tuned_model'):
      loss = arm['runs'][0][name]['eval_loss']
      arm['runs'][0][name] = {'eval_loss': loss}
  report = markdown(record)
  assert 'xact match' not in report
  assert cells(report, '**held-out loss')[0] == '0.600'


def test_operations_that_were_not_counted_are_left_out(make_record):
  record = make_record()
  record['arms']['lora']['flops'] = None
  report = markdown(record)
  assert 'GFLOPs' not in report
  assert 'does not count them' in report


def test_skipped_updates_are_told(make_record):
  record = make_record()
  record['arms']['full']['runs'][0]['skipped_updates'] = 3
  assert 'not applied: full 3, LoRA 0 and QLoRA 0' in markdown(record)
  assert 'not applied' not in markdown(make_record())


def test_a_grid_is_shown_with_what_failed(make_record):
  report = markdown(make_record(grid={'full': [[1e-4, 0.6], [1e-3, None]]}))
  assert '| full | 0.0001 | 0.6000 |' in report
  assert '| full | 0.001 | failed |' in report
  assert 'flatters every arm' in report
  assert 'not tuned arm by arm' in markdown(make_record())


def test_two_arms_of_other_names_are_enough(make_record):
  record = make_record(order=['attention', 'qlora'])
  record['arms']['attention'] = record['arms'].pop('lora')
  report = markdown(record)
  assert 'place of 538.1 MB' in report
  assert '**Use QLoRA** where attention does not fit' in report


@pytest.mark.parametrize(
  ('count', 'text'),
  [(999, '999 B'), (1500, '1.5 kB'), (2e6, '2.0 MB'), (1.614e9, '1.61 GB')],
)
def test_sizes_have_units(count, text):
  assert size(count) == text
