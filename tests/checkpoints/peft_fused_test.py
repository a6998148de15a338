"""How the pairs of single experts lie in a fused one."""

import numpy as np
import pytest

from jlora.checkpoints.peft_fused import Fused, key_of, whole

PARTS = (('gate0', 'gate1'), ('up0', 'up1'))
RANK, IN, OUT = 6, 5, 3
SHARED = Fused('x', RANK, 12.0, PARTS, whole(PARTS, (slice(0, RANK),) * 2))


def make_tensors(gate, up):
  """Returns fused tensors in which parts use some ranks of `lora_B`."""
  rng = np.random.default_rng(0)
  b = rng.normal(size=(2, OUT, RANK, 2)).astype('f4')
  for part, used in enumerate((gate, up)):
    b[part, :, [r for r in range(RANK) if r not in used]] = 0
  return {
    'x.lora_A.weight': rng.normal(size=(2 * RANK, IN)).astype('f4'),
    'x.lora_B.weight': b.reshape(2 * OUT, RANK * 2),
  }


def ranks_of(fused):
  blocks = fused.blocks.items()
  return {m: (x.ranks.start, x.ranks.stop) for m, x in blocks}


@pytest.mark.parametrize(
  ('gate', 'up', 'cut'),
  [
    (range(3), range(3, 6), 3),
    (range(4), range(4, 6), 4),
    (range(1), range(1, 6), 1),
    ((), (), 3),  # untrained: as even as can be
    ((), range(2, 6), 2),
    ((0, 1), (), 3),
  ],
)
def test_what_is_zero_says_where_one_kernel_ends(gate, up, cut):
  tensors = make_tensors(gate, up)
  found = SHARED.in_blocks(tensors)
  assert ranks_of(found) == {
    **dict.fromkeys(PARTS[0], (0, cut)),
    **dict.fromkeys(PARTS[1], (cut, RANK)),
  }
  assert found.holds(tensors)
  assert found.strengths('lora') == {
    **dict.fromkeys(PARTS[0], (cut, 2.0 * cut)),
    **dict.fromkeys(PARTS[1], (RANK - cut, 2.0 * (RANK - cut))),
  }


def test_a_kernel_without_ranks_has_no_pair():
  found = SHARED.in_blocks(make_tensors((), range(6)))
  assert ranks_of(found) == dict.fromkeys(PARTS[1], (0, RANK))
  found = SHARED.in_blocks(make_tensors(range(6), ()))
  assert ranks_of(found) == dict.fromkeys(PARTS[0], (0, RANK))


def test_what_is_not_in_blocks_is_shared():
  tensors = make_tensors(range(4), range(3, 6))
  assert SHARED.in_blocks(tensors) == SHARED
  split = SHARED.split(tensors)
  for expert in '01':
    np.testing.assert_array_equal(
      *(split[key_of(f'{n}{expert}', 'lora_A.weight')] for n in ('gate', 'up'))
    )


def test_values_outside_of_the_blocks_are_seen():
  found = SHARED.in_blocks(make_tensors(range(3), range(3, 6)))
  assert not found.holds(make_tensors(range(4), range(3, 6)))
