"""Facts of jlora.planning.advice."""

import pytest

from jlora.planning.advice import advise

WASTEFUL = {
  'quant': False,
  'train__remat': 'none',
  'train__loss_chunk': 1024,
  'train__batch_size': 8,
  'lora__rank': 64,
}


@pytest.fixture
def advice(make_counting, make_spec):
  """What is tried where a wasteful run has a share of what it needs."""

  def make(share, target='gpu-12gb', **fields):
    planner = make_counting(target)
    spec = planner.prepare(make_spec(**(WASTEFUL | fields)))
    memory = int(planner.count(spec).peak * share)
    planner = make_counting(target, memory=memory)
    return list(advise(planner, spec))

  return make


def test_every_change_is_tried_alone(advice):
  flags = [change.flags for change in advice(0.99)]
  assert flags == [
    '--config.optim.moment_bits=8',
    '--config.optim.offload=True',
    '--config.train.remat=full',
    '--config.train.loss_chunk=64',
    '--config.train.accumulate=8',
    '(start from experiments/qlora.py)',
  ]


def test_what_one_change_makes_fit_needs_no_other(advice):
  changes = advice(0.99)
  assert any(change.estimate.fits for change in changes)
  assert len(changes) == 6


def test_changes_are_tried_together_where_none_is_enough(advice):
  *alone, together = advice(0.07)
  assert not any(change.estimate.fits for change in alone)
  assert together.estimate.fits
  assert all(change.flags in together.flags for change in alone)


def test_more_devices_come_last(advice):
  *others, last = advice(0.03)
  assert not any(change.estimate.fits for change in others)
  assert '--target=gpu-12gb-' in last.flags
  assert '--config.mesh.fsdp=' in last.flags


def test_replicated_parameters_can_be_shared(advice):
  changes = advice(0.99, 'h100-4', mesh__data=4)
  assert '--config.mesh.data=1 --config.mesh.fsdp=4' in {
    change.flags for change in changes
  }


def test_nothing_that_is_set_already_is_advised(advice):
  changes = advice(
    0.01,
    'cpu',
    quant=True,
    train__remat='full',
    train__loss_chunk=64,
    train__batch_size=1,
    optim__moment_bits=8,
  )
  assert changes == []
