"""Ratios, medians, and what is joined to what."""

import json

import pytest

from experiments.benchmarks.harness import results, tables
from experiments.benchmarks.harness.agreement import disagreements
from experiments.benchmarks.harness.results import Column
from experiments.benchmarks.harness.rounds import Rounds
from jlora.errors import DataError

COLUMNS = (
  Column('remat', 'remat'),
  Column('tokens_per_s', 'tokens/s', digits=0),
  Column('peak_bytes', 'peak, GiB', 2**30, 2),
  Column('temp_bytes', 'temp, GiB', 2**30, 2),
)
FACTS = {
  'machine': {'processor': 'abacus', 'threads': 2},
  'versions': {'jax': '0.10.2'},
  'commit': 'abc',
  'date': '2026-01-02',
}


def record(arm, number, rate, **figures):
  return {'arm': arm, 'round': number, 'tokens_per_s': rate, **figures}


def result_of(records, **changes):
  rounds = Rounds(records, {})
  settings = {'batch': 4}
  made = results.make_result(
    'step', settings, COLUMNS, 'ours', rounds, {**FACTS, **changes}
  )
  return {**made, 'tried': {}}


@pytest.fixture
def result():
  rates = {'ours': (100, 50, 90), 'peer': (50, 20, 60)}  # a slow second round
  return result_of(
    [
      record(arm, number, rate, peak_bytes=2**30 * (number + size))
      for arm, size in (('ours', 1), ('peer', 3))
      for number, rate in enumerate(rates[arm])
    ]
  )


def test_speeds_are_compared_within_each_round(result):
  # 2, 2.5 and 1.5; the ratio of the medians would be 1.8
  assert result['summary']['peer']['speed'] == 2.0


def test_of_peaks_the_largest_counts(result):
  assert result['summary']['ours']['peak_bytes'] == 3 * 2**30
  assert result['summary']['peer']['peak'] == 3 / 5


def test_arms_without_a_common_round_have_no_ratio():
  result = result_of([record('ours', 0, 9), record('peer', 1, 9)])
  assert result['summary']['peer']['speed'] is None
  assert '| peer | 9 |' in tables.table(result)


def test_an_arm_of_which_ours_is_missing_has_no_ratio():
  assert 'speed' not in result_of([record('peer', 0, 9)])['summary']['peer']


def test_rounds_that_are_added_count_with_the_others(result):
  number = results.next_round(result)
  assert number == 3
  later = result_of([record('ours', number, 9), record('peer', number, 1)])
  both = results.join(result, later)
  assert both['summary']['peer']['rounds'] == 4
  assert both['summary']['peer']['speed'] == (2 + 2.5) / 2


def test_rounds_of_another_commit_are_not_added(result):
  later = result_of([record('ours', 3, 9)], commit='def')
  with pytest.raises(DataError, match='commit was abc and is def'):
    results.join(result, later)


def test_a_result_is_read_as_it_was_saved(result, tmp_path):
  path = tmp_path / 'results' / 'a.json'
  results.save(path, result)
  assert results.load(path) == result


@pytest.mark.parametrize('text', ['{', json.dumps({'a': 1}), '[]'])
def test_a_file_that_is_no_result_is_named(text, tmp_path):
  path = tmp_path / 'a.json'
  path.write_text(text)
  with pytest.raises(DataError, match=r'a\.json'):
    results.load(path)


def test_a_table_has_a_row_an_arm_and_no_empty_column(result):
  text = tables.table(result)
  titles, _, ours, peer = text.splitlines()[-4:]
  assert titles == (
    '|  | tokens/s | peak, GiB | jlora’s speed | jlora’s peak |'
  )
  assert ours == '| ours | 90 | 3.00 |  |  |'
  assert peer == '| peer | 50 | 5.00 | 2.00 × | 0.60 × |'
  assert '3 rounds on abacus, 2 threads; jax 0.10.2; commit `abc`' in text


def test_what_failed_is_said_under_the_table(result):
  result['failures'] = {'other': 'other is left out'}
  assert tables.table(result).endswith('\n\nother is left out')


def test_the_page_shows_the_results_that_are_there():
  page = tables.README.read_text()
  assert page == tables.rewritten(page, tables.render())


def test_only_what_lies_between_the_marks_is_rewritten():
  page = f'a\n{tables.BEGIN}\nold\n{tables.END}\nb\n'
  new = f'a\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nb\n'
  assert tables.rewritten(page, 'new') == new
  assert tables.rewritten(new, 'new') == new


def test_an_arm_with_another_loss_is_told():
  records = [
    {'arm': arm, 'loss': loss}
    for arm, loss in (('ours', 2.0), ('near', 2.0001), ('far', 2.1))
  ]
  arms = ('ours', 'near', 'far', 'absent')
  assert disagreements(records, 'ours', arms, 1e-4) == {
    'far': (
      'far computes something else: its first loss is 2.10000, and ours 2.00000'
    )
  }


def test_a_loss_that_is_not_finite_disagrees():
  records = [{'arm': 'ours', 'loss': 2.0}, {'arm': 'a', 'loss': float('nan')}]
  assert 'a' in disagreements(records, 'ours', ['a'], 1e-4)
