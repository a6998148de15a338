"""What one process knows of the others; real ones are in training."""

import jax
import numpy as np
import pytest

from jlora.errors import ConfigError
from jlora.parallel import processes
from jlora.parallel.mesh import by_example, make_mesh


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('localhost:1', 2, None), '--process=None belong together'),
    ((None, 2, 0), '--coordinator=None'),
    (('localhost:1', 2, 2), '--process=2 is none of --processes=2'),
    (('localhost:1', 2, -1), '--process=-1 is none of'),
    (('localhost', 2, 0), '--coordinator=localhost is no HOST:PORT'),
    (('localhost:99999', 2, 0), 'is no HOST:PORT'),
  ],
)
def test_incomplete_arguments_are_refused_before_anyone_waits(
  arguments, message
):
  with pytest.raises(ConfigError, match=message):
    processes.connect(*arguments)


def test_one_process_alone_is_the_first_and_asks_nobody():
  assert processes.is_first()
  assert not processes.are_several()
  assert processes.any_of(True)
  assert not processes.any_of(False)
  assert processes.from_first('abc') == 'abc'
  processes.wait('nobody')
  processes.require_same('config', 'any')


def test_rows_that_are_here_make_an_array_of_all_rows():
  sharding = by_example(make_mesh(devices=jax.devices()[:1]))
  mine = processes.rows_here(6, sharding)
  assert mine == slice(0, 6)
  array = np.arange(12).reshape(6, 2)
  found = processes.spread(array[mine], sharding, rows=6, first=mine.start)
  np.testing.assert_array_equal(processes.whole(found), array)
  np.testing.assert_array_equal(processes.spread(array, sharding), array)
