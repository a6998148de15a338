"""The loop on a run of one weight, whose update is written out here."""

import functools
import json
import math
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jlora import config
from jlora.core.state import TrainState
from jlora.errors import (
  CheckpointError,
  ConfigError,
  DataError,
  NonFiniteError,
)
from jlora.inference.scorer import Loss
from jlora.parallel.mesh import make_mesh
from jlora.training import artifacts, evaluation, loop
from jlora.training.job import Job
from jlora.training.report import to_json


@pytest.fixture
def world(monkeypatch):
  """What the stubbed run reads, and what it did."""
  world = types.SimpleNamespace(
    data='d1',
    bad=set(),
    stop_at=None,
    losses={},
    saved=[],
    answered=0,
    sought=[],
    malformed=None,
    folder=None,
    logged=[],
  )

  def build(spec, console, starts):
    state = TrainState(jnp.int32(0), {'w': jnp.ones(3)}, {'m': jnp.zeros(3)})
    job = types.SimpleNamespace(
      spec=spec,
      steps=spec.train.steps,
      state=state,
      frozen=None,
      origin={'base': 'b', 'data': world.data},
      loader=types.SimpleNamespace(
        tokens_in=lambda step: 8,
        state=lambda step: {'step': step},
        seek=lambda state: world.sought.append(state['step']),
        lines=lambda: [],
      ),
      batch=functools.partial(_batch, world),
      step=functools.partial(_step, world),
      rates=[spec.optim.learning_rate] * spec.train.steps,
      description='',
      starts={},
      shardings=types.SimpleNamespace(
        mesh=make_mesh(devices=jax.devices()[:1])
      ),
      footprint=types.SimpleNamespace(rows=lambda: []),
      work=types.SimpleNamespace(rows=lambda: []),
    )
    job.check_origin = functools.partial(Job.check_origin, job)
    return job

  def held_out_loss(job, trainable):
    weight = float(trainable['w'][0])
    loss = world.losses.get(weight, abs(weight - 2))
    return Loss(loss, math.nan, 5, math.isfinite(loss))

  def answer(job, trainable):
    world.answered += 1
    return evaluation.Answers([f'w={trainable["w"][0]}'], None)

  def save_trained(job, folder, name, trainable, step):
    world.saved.append((name, step))
    folder.write(f'{name}.txt', str(np.asarray(trainable['w']).tolist()))

  def write_summary(job, folder, progress, metrics, after):
    folder.write(
      'summary.json', to_json({'skipped': progress.skipped, **after})
    )

  monkeypatch.setattr(loop, 'build', build)
  monkeypatch.setattr(loop, 'warn_of_idle_gpu', lambda: None)
  monkeypatch.setattr(evaluation, 'held_out_loss', held_out_loss)
  monkeypatch.setattr(evaluation, 'answer', answer)
  monkeypatch.setattr(artifacts, 'save_trained', save_trained)
  monkeypatch.setattr(artifacts, 'write_samples', lambda *_: None)
  monkeypatch.setattr(artifacts, 'write_summary', write_summary)
  return world


def _batch(world, step):
  if step == world.malformed:
    raise DataError('row 9 is malformed')
  return types.SimpleNamespace(step=step)


def _step(world, state, frozen, batch):
  """Adds a tenth, and leaves trainable and optimizer alone if it is bad."""
  number = int(state.step) + 1
  world.logged.append(len(trained_in(world.folder)))
  assert batch.step == number - 1  # the data follows the step
  if number == world.stop_at:
    os.kill(os.getpid(), signal.SIGTERM)
  finite = number not in world.bad
  loss = jnp.float32(1 / number if finite else math.nan)
  moved = TrainState(
    jnp.int32(number),
    {'w': state.trainable['w'] + 0.1 * finite},
    {'m': state.opt_state['m'] + finite},
  )
  measured = {'loss': loss, 'tokens': 7, 'grad_norm': loss, 'finite': finite}
  return moved, measured


@pytest.fixture
def run(world, tmp_path, capsys):
  """Trains in the same folder; gives whether it ended and what it said."""

  world.folder = tmp_path / 'run'

  def train(steps=6, *, profile=False, **sections):
    sections = {
      'data': {'train': 'x.jsonl'},
      'eval': {'every': 3},
      **sections,
      'train': {
        'steps': steps,
        'checkpoint_every': 2,
        'max_skipped': 2,
        **sections.get('train', {}),
      },
    }
    console = Console(soft_wrap=True, highlight=False, width=200)
    ended = loop.train(
      config.resolve(sections), world.folder, console, profile=profile
    )
    return ended, capsys.readouterr().out

  train.folder = world.folder
  return train


def lines_of(run):
  text = (run.folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def trained_in(folder):
  """The lines of updates that were written so far."""
  lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return [line for line in lines if 'tokens' in line]


def weight_after(steps):
  weight = np.float32(1)
  for _ in range(steps):
    weight += np.float32(0.1)
  return float(weight)


def test_a_run_ends_with_what_its_steps_made(run, world):
  assert run()[0]
  text = (run.folder / 'adapter.txt').read_text()
  assert text == str([weight_after(6)] * 3)
  assert world.saved == [('best', 3), ('best', 6), ('adapter', 6)]
  assert world.answered == 2


def test_devices_are_a_step_ahead_of_what_is_written(run, world):
  run()
  # A checkpoint after 2 and 4, an evaluation after 3: these wait.
  assert world.logged == [0, 0, 2, 3, 4, 4]
  assert [x['step'] for x in trained_in(run.folder)] == list(range(1, 7))


def test_a_trace_begins_and_ends_with_nothing_running(run, world, monkeypatch):
  calls = []
  for name in ('start_trace', 'stop_trace'):
    monkeypatch.setattr(
      jax.profiler,
      name,
      lambda *_, name=name, **__: calls.append(
        (name, len(trained_in(run.folder)))
      ),
    )
  every = {'checkpoint_every': 100}
  said = run(8, profile=True, train=every, eval={'every': 100})[1]
  assert calls == [('start_trace', 2), ('stop_trace', 5)]
  assert f'traced steps 3 to 5: open {run.folder}/profile/plugins' in said
  assert 'no step is left' in run(8, profile=True, train=every)[1]


def test_a_signal_saves_the_step_it_came_in(run, world):
  world.stop_at = 3
  ended, said = run()
  assert not ended
  assert 'stopped after step 3' in said
  assert [p.name for p in (run.folder / 'checkpoints').iterdir()].count('3')
  assert not (run.folder / 'summary.json').exists()


def test_a_malformed_row_loses_no_step(run, world):
  world.malformed = 3  # checkpoints are made every second step
  with pytest.raises(DataError, match='row 9'):
    run()
  world.malformed = None
  assert run()[0]
  assert world.sought == [3]
  assert (run.folder / 'adapter.txt').read_text() == str([weight_after(6)] * 3)


def test_a_continued_run_equals_an_uninterrupted_one(run, world):
  run()
  names = ('adapter.txt', 'best.txt', 'summary.json')
  whole = [(run.folder / name).read_text() for name in names]
  lines = [x['step'] for x in lines_of(run)]
  run.folder.rename(run.folder.with_name('whole'))
  for world.stop_at in (1, 4, 5):
    assert not run()[0]
  assert run()[0]
  assert world.sought == [1, 4, 5]  # the data goes on where it stood
  assert [(run.folder / name).read_text() for name in names] == whole
  assert [x['step'] for x in lines_of(run)] == lines


def test_steps_after_the_last_checkpoint_are_written_again(run, world):
  world.stop_at = 3
  run()
  path = run.folder / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 4, "loss": 9.0}\n{"step": 5, ')
  assert run()[0]
  assert [x['step'] for x in lines_of(run)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
  assert all(x.get('loss') != 9.0 for x in lines_of(run))


def test_an_update_that_is_not_finite_is_skipped_and_counted(run, world):
  world.bad = {2, 4, 5}
  assert run()[0]
  lines = [x for x in lines_of(run) if 'loss' in x]
  assert [x['skipped'] for x in lines] == [0, 1, 1, 2, 3, 3]
  assert [x['loss'] is None for x in lines] == [
    step in world.bad for step in range(1, 7)
  ]
  assert json.loads((run.folder / 'summary.json').read_text())['skipped'] == 3


def test_too_many_in_a_row_stop_with_the_last_good_state(run, world):
  world.bad = {3, 4, 5}
  with pytest.raises(NonFiniteError, match='3 updates up to step 5') as caught:
    run()
  assert caught.value.exit_code == 3
  world.bad = set()
  assert 'continuing after step 4' in run()[1]


def test_a_worse_adapter_does_not_replace_the_best(run, world):
  world.losses = {weight_after(6): 9.0}
  assert 'held-out loss 9.0000\n' in run()[1]
  assert world.saved == [('best', 3), ('adapter', 6)]


def test_a_loss_that_is_not_finite_does_not_become_the_best(run, world):
  world.losses = {weight_after(3): math.nan, 1.0: math.nan}
  ended, said = run()
  assert ended
  assert 'step 3: held-out loss nan, which is not finite' in said
  assert world.saved == [('best', 6), ('adapter', 6)]
  assert lines_of(run)[0] == {'step': 0, 'eval_loss': None}


def test_a_finished_run_loads_nothing(run, world, monkeypatch):
  run()
  monkeypatch.setattr(loop, 'build', None)
  assert run() == (True, f'{run.folder} is complete; nothing to do\n')
  changed = {'optim': {'learning_rate': 9e-4}}
  before = (run.folder / 'config.json').read_text()
  assert run(**changed)[0]
  assert (run.folder / 'config.json').read_text() == before


def test_another_learning_rate_continues_and_is_said(run, world):
  world.stop_at = 2
  run()
  ended, said = run(optim={'learning_rate': 9e-4})
  assert ended
  assert 'optim.learning_rate=0.0009, which was 0.0002' in said
  assert lines_of(run)[-2]['learning_rate'] == 9e-4


def test_a_finished_run_can_be_made_longer(run, world):
  run()
  ended, said = run(steps=8)
  assert ended
  assert 'train.steps=8, which was 6' in said
  assert [x['step'] for x in lines_of(run)] == [
    0,
    1,
    2,
    3,
    3,
    4,
    5,
    6,
    6,
    7,
    8,
    8,
  ]
  assert (
    json.loads((run.folder / 'config.json').read_text())['train']['steps'] == 8
  )


def test_a_run_made_shorter_is_measured_where_it_stands(run, world):
  world.stop_at = 5
  run()
  assert run(steps=4)[0]
  assert lines_of(run)[-1]['step'] == 5
  assert 'eval_loss' in lines_of(run)[-1]
  assert world.saved[-1] == ('adapter', 5)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'lora': {'rank': 8}}, 'lora.rank=16, and this config has 8'),
    ({'eval': {'samples': 3}}, 'eval.samples=8'),
    ({'seed': 1}, 'seed=0'),
  ],
)
def test_what_would_make_another_run_is_refused(run, world, changed, message):
  world.stop_at = 2
  run()
  with pytest.raises(ConfigError, match=message):
    run(**changed)


def test_other_data_is_refused(run, world):
  world.stop_at = 2
  run()
  world.data = 'd2'
  with pytest.raises(DataError, match='data of sha256 d1, and now it has d2'):
    run()


def test_a_damaged_checkpoint_falls_back_aloud_to_the_same_end(run, world):
  run()
  lines = lines_of(run)[-1]
  (run.folder / 'summary.json').unlink()
  for path in (run.folder / 'checkpoints' / '6').rglob('*'):
    if path.is_file():
      os.truncate(path, 0)
  with pytest.warns(UserWarning, match='step 6 .* damaged .* step 4 is used'):
    ended, said = run()
  assert ended
  assert 'continuing after step 4' in said
  assert lines_of(run)[-1] == lines


def test_checkpoints_without_a_config_are_not_continued(run, world):
  world.stop_at = 2
  run()
  (run.folder / 'config.json').write_text('{')
  with pytest.raises(CheckpointError, match='cannot be read'):
    run()


def test_a_refused_run_leaves_no_folder(run, world, monkeypatch):
  def refuse(spec, console, starts):
    raise ConfigError('no')

  monkeypatch.setattr(loop, 'build', refuse)
  with pytest.raises(ConfigError):
    run()
  assert not run.folder.exists()


def test_whole_models_have_no_best(run, world):
  run(lora={'targets': (), 'train_full': '.*'})
  assert world.saved == [('model', 6)]


def test_a_finished_run_without_checkpoints_is_complete_and_stays(run, world):
  run()
  saved = list(world.saved)
  shutil.rmtree(run.folder / 'checkpoints')
  ended, said = run()
  assert ended
  assert 'complete' in said
  with pytest.raises(ConfigError, match=r'lora\.rank'):
    run(lora={'rank': 8})
  with pytest.raises(ConfigError, match='checkpoints are gone'):
    run(steps=9)
  assert world.saved == saved
