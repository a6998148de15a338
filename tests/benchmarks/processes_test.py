"""Arms in processes of their own: what they answer, and how they fail."""

import pytest

from experiments.benchmarks.harness import processes, rounds, worker
from experiments.benchmarks.harness.processes import Arm, ArmError, Limits

MODULE = 'tests.benchmarks.arm'


@pytest.fixture
def limits(tmp_path):
  return Limits(threads=1, seconds=60.0, cache=tmp_path)


def arm(name='a', **work):
  return Arm(name, MODULE, work)


def test_a_process_has_its_threads_and_answers_with_its_peak(limits):
  record = processes.run(arm(), limits)
  assert record['arm'] == 'a'
  assert record['processors'] == 1
  assert record['openmp'] == '1'
  assert record['cold']
  assert 2**20 < record['peak_bytes'] < 2**27  # not those of this process


def test_a_missing_package_is_named_with_the_remedy(limits):
  with pytest.raises(ArmError, match=r"numpie.*pip install -e '.\[bench\]'"):
    processes.run(arm(lacks='numpie'), limits)


def test_an_error_is_said_in_one_line(limits):
  with pytest.raises(ArmError, match='a is left out: it failed with KeyError'):
    processes.run(arm(fails=True), limits)


def test_an_arm_that_does_not_answer_is_ended(tmp_path):
  with pytest.raises(ArmError, match=r'no answer in 0.3 s; raise --timeout'):
    processes.run(arm(waits=True), Limits(1, 0.3, tmp_path))


def test_a_killed_process_is_told(limits):
  with pytest.raises(ArmError, match='signal 9, perhaps for want of memory'):
    processes.run(arm(killed=True), limits)


def test_arms_take_turns_and_a_failed_one_is_left_out(limits, monkeypatch):
  calls = []

  def run(arm, _):
    calls.append(arm.name)
    if arm.name == 'b':
      raise ArmError('b is left out')
    return {
      'arm': arm.name,
      'cold': len(calls) < 3,
      'tokens_per_s': 1.0,
      'compile_s': 7.0,
    }

  monkeypatch.setattr(processes, 'run', run)
  arms, said = [arm('a'), arm('b'), arm('c')], []
  found = rounds.take_turns(arms, 2, limits, said.append, first=3)
  assert calls == ['a', 'b', 'c', 'a', 'c']
  assert [(r['round'], r['arm']) for r in found.records] == [
    (3, 'a'),
    (3, 'c'),
    (4, 'a'),
    (4, 'c'),
  ]
  assert found.failures == {'b': 'b is left out'}
  assert 'b is left out' in said
  assert [r.get('cold_compile_s') for r in found.records] == [
    7,
    None,
    None,
    None,
  ]


def test_the_first_step_is_not_timed(monkeypatch):
  clock = iter([0, 50, 50, 51, 51, 54, 54, 56])
  monkeypatch.setattr(worker.time, 'perf_counter', lambda: next(clock))
  found = worker.timed(float, [6] * 4, began=0.0)
  assert found['steps_s'] == [1, 3, 2]
  assert found['losses'] == [0, 1, 2, 3]
  assert found['tokens_per_s'] == 3


def test_steps_of_different_size_count_by_their_sum(monkeypatch):
  clock = iter([0, 50, 50, 51, 51, 54])
  monkeypatch.setattr(worker.time, 'perf_counter', lambda: next(clock))
  assert worker.timed(float, [6, 8, 4], began=0.0)['tokens_per_s'] == 3
