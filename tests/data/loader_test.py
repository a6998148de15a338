import jax
import numpy as np
import pytest

from jlora.data.loader import (
  Loader,
  digest,
  eval_batches,
  packing_efficiency,
)
from jlora.data.mixing import Mixture
from jlora.data.tokens import Example
from jlora.errors import DataError

LENGTHS = [3, 9, 5, 7, 2, 8, 4, 6, 9, 3, 5]


@pytest.fixture
def examples(make_examples):
  return make_examples(LENGTHS)


def make_loader(examples, **kwargs):
  options = {'batch_size': 2, 'max_length': 12, 'seed': 5} | kwargs
  return Loader(examples, **options)


def same(a, b):
  return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def learned(batches):
  targets = [
    np.asarray(b.targets)[np.asarray(b.loss_mask) > 0] for b in batches
  ]
  return sorted(np.concatenate(targets).tolist())


@pytest.mark.parametrize('pack', [True, False])
def test_every_epoch_holds_every_example_once(examples, pack):
  loader = make_loader(examples, pack=pack)
  wanted = sorted(t for e in examples for t in e.tokens[e.loss_mask].tolist())
  for epoch in range(4):
    steps = range(
      loader.steps_in(epoch) if epoch else 0, loader.steps_in(epoch + 1)
    )
    assert learned([loader.batch(step) for step in steps]) == wanted
    assert {loader.epoch_of(step) for step in steps} == {epoch}


def test_a_step_does_not_depend_on_the_steps_before(examples):
  straight = make_loader(examples)
  batches = [straight.batch(step) for step in range(30)]
  for step in (29, 0, 17, 17, 3):
    assert same(make_loader(examples).batch(step), batches[step])
    assert same(straight.batch(step), batches[step])


def test_an_epoch_holds_what_its_mixture_draws(examples):
  mixture = Mixture((8, 3), (1, 1))
  loader = make_loader(examples, mixture=mixture, pack=False)
  assert loader.steps_per_epoch == 3  # six examples, two a batch
  seen = []
  for epoch in range(4):
    steps = range(loader.steps_in(epoch) if epoch else 0, 3 * (epoch + 1))
    held = [examples[i] for i in mixture.draw(5, epoch)]
    wanted = sorted(t for e in held for t in e.tokens[e.loss_mask].tolist())
    seen.append(learned([loader.batch(step) for step in steps]))
    assert seen[-1] == wanted
  assert seen[0] != seen[1]


def test_epochs_and_seeds_differ(examples):
  loader = make_loader(examples)
  second = loader.batch(loader.steps_per_epoch)
  assert not same(loader.batch(0), second)
  assert not same(loader.batch(0), make_loader(examples, seed=6).batch(0))


def test_the_order_is_the_same_on_every_machine():
  # Two argsorts of the raw bits of numpy.random.Philox(key=[3, 0]), NumPy 2.4.
  examples = [
    Example(np.array([i, i], np.int32), np.array([False, True]))
    for i in range(8)
  ]
  loader = Loader(examples, batch_size=8, max_length=1, seed=3, pack=False)
  assert loader.batch(0).tokens[:, 0].tolist() == [*(4, 2, 6, 5, 1, 0, 7, 3)]


def test_the_last_batch_of_an_epoch_is_completed_with_empty_rows(examples):
  loader = make_loader(examples, pack=False)
  assert loader.steps_per_epoch == 6
  last = loader.batch(5)
  assert last.tokens.shape == (2, 12)
  assert last.segment_ids[0].any()
  assert not last.segment_ids[1].any()
  assert not last.loss_mask[1].any()


def test_fewer_examples_than_a_batch_leave_rows_empty(make_examples):
  batch = make_loader(make_examples([4]), batch_size=8).batch(3)
  assert batch.segment_ids.any(axis=1).sum() == 1


def test_a_part_of_an_epoch_is_rounded_up(examples):
  loader = make_loader(examples, pack=False)
  assert [loader.steps_in(e) for e in (0.01, 0.5, 0.51, 1, 1.5, 3)] == [
    *(1, 3, 4, 6, 9, 18)
  ]


def test_no_example_and_negative_steps_are_refused(examples):
  with pytest.raises(DataError, match='no example'):
    make_loader([])
  with pytest.raises(DataError, match='step -1'):
    make_loader(examples).batch(-1)


@pytest.mark.parametrize('pack', [True, False])
def test_evaluation_holds_every_example_once_in_a_fixed_order(examples, pack):
  options = {'batch_size': 4, 'max_length': 12, 'pack': pack}
  batches = eval_batches(examples, **options)
  assert {b.tokens.shape for b in batches} == {(4, 12)}
  assert learned(batches) == sorted(
    t for e in examples for t in e.tokens[e.loss_mask].tolist()
  )
  assert all(map(same, batches, eval_batches(examples, **options)))


def test_the_digest_sees_tokens_masks_and_borders(examples):
  first, second, *rest = examples
  mask = first.loss_mask.copy()
  mask[-1] ^= True
  joined = Example(
    np.concatenate([first.tokens, second.tokens]),
    np.concatenate([first.loss_mask, second.loss_mask]),
  )
  variants = [
    examples,
    [Example(first.tokens + 1, first.loss_mask), second, *rest],
    [Example(first.tokens, mask), second, *rest],
    [second, first, *rest],
    [joined, *rest],
  ]
  assert len({digest(variant) for variant in variants}) == len(variants)
  assert digest(examples) == digest(list(examples))


def test_the_digest_sees_how_zeros_are_divided():
  one, five = (
    Example(np.zeros(n, np.int32), np.zeros(n, bool)) for n in (1, 5)
  )
  assert digest([one] * 5) != digest([five])


def test_efficiency_counts_filled_places(make_examples):
  # Four places each: two examples fill a row of eight, one row of twelve is
  # filled by three.
  examples = make_examples([5, 5, 5, 5])
  for row, share in ((8, 1.0), (12, 16 / 24), (16, 1.0)):
    assert packing_efficiency(examples, max_length=row, pack=True) == share
  assert packing_efficiency(examples, max_length=8, pack=False) == 0.5


def test_some_rows_of_a_batch_are_those_of_the_whole(make_examples):
  loader = make_loader(make_examples([4] * 40), batch_size=8)
  for step in (0, 1):
    whole, part = loader.batch(step), loader.batch(step, slice(2, 6))
    assert same(part, jax.tree.map(lambda x: x[2:6], whole))
    assert loader.tokens_in(step) == (whole.segment_ids > 0).sum()
