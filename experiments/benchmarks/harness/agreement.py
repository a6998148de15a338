"""Whether all arms compute the same: who else's speed would be compared?"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def disagreements(
  records: Sequence[Mapping[str, Any]],
  ours: str,
  arms: Collection[str],
  close: float,
) -> dict[str, str]:
  """Returns a sentence for each arm whose first loss is not ours.

  Args:
    records: With `arm` and `loss`.
    ours: Name of the arm that the others must agree with.
    arms: Those that must.
    close: How far from ours a loss may lie, as a share of it.
  """
  losses = {r['arm']: r['loss'] for r in records if 'loss' in r}
  mine = losses.get(ours)
  if mine is None:
    return {}
  return {
    arm: (
      f'{arm} computes something else: its first loss is {losses[arm]:.5f},'
      f' and ours {mine:.5f}'
    )
    for arm in arms
    if arm in losses and not abs(losses[arm] - mine) <= close * abs(mine)
  }
