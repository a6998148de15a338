"""Which steps are traced, and what is left of a trace."""

import types

import jax
import jax.numpy as jnp
import pytest

from jlora.training.profiling import Trace


@pytest.fixture
def said():
  return []


@pytest.mark.parametrize(
  ('done', 'steps', 'traced'),
  [
    (0, 100, (2, 5)),  # after two steps
    (40, 100, (42, 45)),  # of this process
    (0, 4, (2, 4)),
    (0, 2, (1, 2)),  # rather a step than a warm-up
    (7, 8, (7, 8)),
  ],
)
def test_three_steps_are_traced_after_a_warm_up(done, steps, traced, said):
  trace = Trace('profile', done, steps, said.append)
  assert (trace.first, trace.last) == traced
  assert [step for step in range(steps + 1) if trace.is_edge(step)] == [*traced]


def test_a_run_without_steps_left_says_that_nothing_is_traced(said):
  assert Trace('profile', 8, 8, said.append).first is None
  assert 'no step is left' in said[0]


def test_a_trace_is_written_and_said_where(tmp_path, said):
  folder = tmp_path / 'profile'
  with Trace(folder, 0, 2, said.append) as trace:
    for step in range(2):
      trace.begin(step)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()
      trace.end(step + 1)
  (line,) = said
  assert line.startswith(f'traced steps 2 to 2: open {folder}/')
  assert list(folder.glob('plugins/profile/*/perfetto_trace.json.gz'))
  assert list(folder.glob('plugins/profile/*/*.xplane.pb'))


@pytest.fixture
def stubbed(monkeypatch):
  """Calls of jax's profiler; the last can be made to fail."""
  calls = types.SimpleNamespace(begun=0, ended=0, error=None)

  def start(*_, **__):
    calls.begun += 1

  def stop():
    calls.ended += 1
    if calls.error:
      raise calls.error

  monkeypatch.setattr(jax.profiler, 'start_trace', start)
  monkeypatch.setattr(jax.profiler, 'stop_trace', stop)
  return calls


def test_a_run_that_stops_within_a_trace_writes_it(stubbed, said):
  with Trace('profile', 0, 9, said.append) as trace:
    trace.begin(2)
  assert (stubbed.begun, stubbed.ended) == (1, 1)
  assert 'steps from 3 to the stop' in said[0]


def test_a_trace_that_cannot_be_written_is_said_and_ends_nothing(stubbed, said):
  stubbed.error = OSError('no space left')
  trace = Trace('profile', 0, 9, said.append)
  trace.begin(2)
  with pytest.warns(UserWarning, match='no space left; training goes on'):
    trace.end(5)
  with trace:
    pass
  assert stubbed.ended == 1
  assert said == []


def test_without_a_folder_nothing_is_traced(stubbed, said):
  with Trace(None, 0, 9, said.append) as trace:
    for step in range(10):
      trace.begin(step)
      trace.end(step)
  assert (stubbed.begun, said) == (0, [])
