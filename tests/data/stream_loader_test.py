import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jlora.data.recipe import Recipe
from jlora.data.stream_loader import StreamLoader
from jlora.data.streams import SourceStream
from jlora.errors import DataError


@pytest.fixture
def make_loader(tokenizer, write):
  """Makes loaders over a file of exchanges and one of texts."""
  random = np.random.default_rng(0)
  chats = [
    {'prompt': f'q{i}', 'completion': 'the answer ' * random.integers(1, 5)}
    for i in range(37)
  ]
  texts = [{'text': f'{i} is the answer ' * 4 * (i % 5 + 1)} for i in range(9)]
  paths = [
    write(*map(json.dumps, chats), name='chats.jsonl'),
    write(*map(json.dumps, texts), name='texts.jsonl'),
  ]

  def make(shares=(0.75, 0.25), **options):
    recipe = Recipe(tokenizer=tokenizer, max_length=40)
    streams = [
      SourceStream(path, recipe) for path, _ in zip(paths, shares, strict=False)
    ]
    options = {'batch_size': 4, 'buffer': 16, 'seed': 5} | options
    return StreamLoader(streams, shares, max_length=40, **options)

  return make


def same(a, b):
  return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize('pack', [True, False])
def test_a_resumed_run_reads_what_an_uninterrupted_one_does(make_loader, pack):
  straight = make_loader(pack=pack)
  batches = [straight.batch(step) for step in range(40)]
  again = make_loader(pack=pack)
  for step in range(40):
    state = json.loads(json.dumps(straight.state(step)))
    resumed = make_loader(pack=pack)
    resumed.seek(state)
    for later in range(step, min(step + 6, 40)):
      assert same(resumed.batch(later), batches[later])
    assert resumed.state(step) == straight.state(step)
    # The step alone gives the same, at the price of the blocks before.
    assert same(again.batch(39 - step), batches[39 - step])


def test_a_state_that_is_ahead_is_known_before_it_is_read(make_loader):
  loader, other = make_loader(), make_loader()
  step = 0
  while loader.state(step)['block'] == 0:
    loader.batch(step)
    step += 1
  other.seek(loader.state(step))
  assert same(other.batch(step), loader.batch(step))


def test_some_rows_of_a_batch_are_those_of_the_whole(make_loader):
  loader = make_loader()
  for step in range(8):
    whole, part = loader.batch(step), loader.batch(step, slice(1, 3))
    assert same(part, jax.tree.map(lambda x: x[1:3], whole))
    assert loader.tokens_in(step) == (whole.segment_ids > 0).sum()


def test_seeds_and_blocks_differ_in_their_order(make_loader):
  first = make_loader((1.0,), buffer=37, pack=False)
  other = make_loader((1.0,), buffer=37, pack=False, seed=6)
  steps = 10  # 37 rows, four a batch
  epochs = [
    np.concatenate([loader.batch(s).tokens for s in range(a, a + steps)])
    for loader, a in ((first, 0), (first, steps), (other, 0))
  ]
  rows = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
  assert rows[0] == rows[1] == rows[2]
  assert len({epoch.tobytes() for epoch in epochs}) == 3


def test_batches_of_a_block_are_about_equally_full(make_loader):
  loader = make_loader((1.0,), buffer=17, batch_size=8, pack=False)
  filled = [
    int(loader.batch(step).segment_ids.any(axis=1).sum()) for step in range(6)
  ]
  assert filled == [5, 6, 6, 5, 6, 6]


def test_sources_keep_to_their_shares(make_loader):
  loader = make_loader((0.8, 0.2), buffer=10)
  loader.batch(0)
  step = 0
  while loader.state(step)['block'] < 3:
    loader.batch(step)
    step += 1
  assert loader.state(step)['taken'] == (24, 6)


def test_other_sources_and_negative_steps_are_refused(make_loader):
  state = make_loader((1.0,)).state(0)
  with pytest.raises(DataError, match='in 1 sources, and now there are 2'):
    make_loader().seek(state)
  with pytest.raises(DataError, match='step -1'):
    make_loader().batch(-1)


def test_a_process_does_not_wait_for_the_next_block():
  code = """
import time
import numpy as np
from jlora.data.stream_loader import StreamLoader
from jlora.data.tokens import Example

class Slow:
  position, taken = (0, 0), 0
  def seek(self, position): pass
  def take(self):
    self.taken += 1
    time.sleep(0.1 * (self.taken > 400))  # the second block takes 40 s
    return Example(np.zeros(2, np.int32), np.array([False, True]))

loader = StreamLoader([Slow()], [1.0], batch_size=4, max_length=8, buffer=400)
loader.batch(0)
time.sleep(0.2)
"""
  subprocess.run([sys.executable, '-c', code], check=True, timeout=30)


def test_a_fault_of_the_thread_reaches_whoever_asks(make_loader):
  class OddError(Exception):
    pass

  def take():
    raise OddError

  loader = make_loader((1.0,))
  loader.first_block()
  loader._streams[0].take = take
  with pytest.raises(OddError):
    [loader.batch(step) for step in range(20)]
