import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoints.runs import KEPT, RunCheckpoints
from jlora.core.state import TrainState
from jlora.errors import CheckpointError

# Orbax drops coroutines where one of several reads fails.
pytestmark = pytest.mark.filterwarnings(
  'ignore:coroutine:RuntimeWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
)
RECORD = {'texts': ['ä'], 'best_loss': float('inf'), 'skipped': 0}


def make_state(step, fill=1.0):
  trainable = {'kernel': {'a': jnp.full((64, 8), fill), 'b': jnp.ones((8, 9))}}
  moments = jax.tree.map(lambda x: x * 0.3, trainable)
  return TrainState(jnp.int32(step), trainable, moments)


def save_steps(folder, *steps):
  with RunCheckpoints(folder) as checkpoints:
    for step in steps:
      checkpoints.save(make_state(step, step / 7), {**RECORD, 'step': step})


def assert_restores(checkpoints, step):
  state, record = checkpoints.restore(make_state(0))
  jax.tree.map(np.testing.assert_array_equal, state, make_state(step, step / 7))
  assert record == {**RECORD, 'step': step}


@pytest.fixture(autouse=True)
def _collect_dropped_coroutines():
  yield
  gc.collect()


@pytest.fixture(scope='session')
def two_saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
  save_steps(folder, 3, 5)
  return folder


@pytest.fixture
def saved(two_saved, tmp_path):
  return shutil.copytree(two_saved, tmp_path / 'checkpoints')


def files_of(saved, step):
  return sorted(p for p in (saved / str(step)).rglob('*') if p.is_file())


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_state_comes_back_bit_for_bit(saved):
  with RunCheckpoints(saved) as checkpoints:
    assert_restores(checkpoints, 5)


def test_an_empty_folder_restores_nothing_and_is_removed(tmp_path):
  with RunCheckpoints(tmp_path / 'x') as checkpoints:
    assert checkpoints.restore(make_state(0)) is None
  assert not (tmp_path / 'x').exists()


def test_only_the_newest_are_kept(saved):
  save_steps(saved, 8)
  with RunCheckpoints(saved) as checkpoints:
    assert checkpoints.steps() == [5, 8]
  assert KEPT == 2


def test_a_save_without_its_end_is_invisible(saved):
  unfinished = saved / '9.orbax-checkpoint-tmp'
  shutil.copytree(saved / '5', unfinished)
  for mark in unfinished.rglob('commit_success.txt'):
    mark.unlink()
  with RunCheckpoints(saved) as checkpoints:
    assert_restores(checkpoints, 5)


def test_truncated_arrays_fall_back_with_a_warning(saved):
  for path in files_of(saved, 5):
    truncate(path)
  with RunCheckpoints(saved) as checkpoints:
    with pytest.warns(UserWarning, match='step 5 .* damaged .* step 3 is used'):
      assert_restores(checkpoints, 3)
    checkpoints.save(make_state(5, 5 / 7), {**RECORD, 'step': 5})
    assert_restores(checkpoints, 5)


@pytest.mark.filterwarnings('ignore:the checkpoint of step 5:UserWarning')
def test_a_flipped_bit_is_never_restored(two_saved, tmp_path):
  random = np.random.default_rng(0)
  restored = []
  for i, path in enumerate(files_of(two_saved, 5) * 3):
    saved = shutil.copytree(two_saved, tmp_path / str(i))
    content = bytearray(path.read_bytes() or b'0')
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    (saved / path.relative_to(two_saved)).write_bytes(content)
    with RunCheckpoints(saved) as checkpoints:
      restored.append(int(checkpoints.restore(make_state(0))[0].step))
      assert_restores(checkpoints, restored[-1])
  assert set(restored) == {3, 5}  # some files hold nothing that is read


def test_arrays_that_were_exchanged_are_refused(saved):
  shutil.rmtree(saved / '5' / 'state')
  shutil.copytree(saved / '3' / 'state', saved / '5' / 'state')
  with (
    RunCheckpoints(saved) as checkpoints,
    pytest.warns(UserWarning, match='was saved'),
  ):
    assert_restores(checkpoints, 3)


def test_where_all_are_damaged_nothing_starts_from_zero(saved):
  for step in (3, 5):
    for path in files_of(saved, step):
      truncate(path)
  with (
    RunCheckpoints(saved) as checkpoints,
    pytest.raises(CheckpointError, match=r'step 5: .*step 3: ') as caught,
  ):
    checkpoints.restore(make_state(0))
  assert caught.value.exit_code == 3
  assert (saved / '3').exists()


def test_a_state_of_other_shapes_is_no_silent_partial_load(saved):
  like = TrainState(jnp.int32(0), {'kernel': {'a': jnp.ones((64, 4))}}, {})
  with RunCheckpoints(saved) as checkpoints, pytest.raises(CheckpointError):
    checkpoints.restore(like)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(CheckpointError, match='another --workdir'):
    RunCheckpoints(tmp_path / 'checkpoints')


def test_a_full_disk_keeps_what_is_there(saved):
  import resource

  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with RunCheckpoints(saved) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
      with pytest.raises(CheckpointError, match='step 9'):
        checkpoints.save(make_state(9), RECORD)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  with RunCheckpoints(saved) as checkpoints:
    assert_restores(checkpoints, 5)


def test_a_second_save_of_a_step_changes_nothing(saved):
  with RunCheckpoints(saved) as checkpoints:
    checkpoints.save(make_state(5, 0.0), RECORD)
    assert_restores(checkpoints, 5)
