"""What a comparison compares, and what must be equal for it."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from jlora.core.tree import leaves_by_path
from jlora.errors import ConfigError
from jlora.training.run_spec import RunSpec

_MAY_DIFFER = ('lora', 'quant', 'optim.learning_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSpec:
  """What is compared with what.

  Attributes:
    arms: A run each, by name. They may differ in `lora`, `quant` and
      `optim.learning_rate`.
    seeds: One run an arm for each.
    grid: Factors of an arm's learning rate, of which the one with the lowest
      held-out loss is taken; empty to take the rate as it is.
    timing_rounds: Rounds in which the arms take turns for `timing_steps`; 0 to
      time the runs themselves.
    timing_steps: Steps an arm and round.
  """

  arms: Mapping[str, RunSpec]
  seeds: tuple[int, ...] = (0,)
  grid: tuple[float, ...] = ()
  timing_rounds: int = 0
  timing_steps: int = 6

  def __post_init__(self) -> None:
    """Checks the fields."""
    if len(self.arms) < 2:
      raise ConfigError(
        f'arms are {list(self.arms)}; a comparison takes two or more'
      )
    for name in self.arms:
      if not re.fullmatch(r'\w+', name):
        raise ConfigError(
          f'arm {name!r} names folders; use letters, digits and underscores'
        )
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise ConfigError(f'seeds are {self.seeds}; give one or more, each once')
    if not all(factor > 0 for factor in self.grid):
      raise ConfigError(
        f'grid is {self.grid}; factors of a learning rate are above 0'
      )
    if self.timing_rounds < 0 or self.timing_steps < 2:
      raise ConfigError(
        f'timing.rounds is {self.timing_rounds} and timing.steps'
        f' {self.timing_steps}; they take 0 or more, and 2 or more'
      )
    self._check_budgets()

  def _check_budgets(self) -> None:
    """Requires equal data and token budgets."""
    first, *others = [(name, flat(arm)) for name, arm in self.arms.items()]
    for name, fields in others:
      for field in sorted(fields.keys() | first[1].keys()):
        one, other = first[1].get(field), fields.get(field)
        if one != other and not _is_within(field, _MAY_DIFFER):
          raise ConfigError(
            f'arm {first[0]!r} has {field}={one!r} and arm {name!r} {other!r};'
            f' arms may differ in {", ".join(_MAY_DIFFER)} only'
          )


def _is_within(field: str, sections: tuple[str, ...]) -> bool:
  return any(f'{field}.'.startswith(f'{name}.') for name in sections)


def flat(run: RunSpec) -> dict[str, Any]:
  """Returns the fields of a run as JSON values, by names such as `train.steps`.

  Args:
    run: The run.
  """
  return flat_json(run.to_json())


def flat_json(text: str) -> dict[str, Any]:
  """Returns the same of a run folder's config.json.

  Args:
    text: What the file holds.
  """
  fields = leaves_by_path(
    json.loads(text), is_leaf=lambda node: not isinstance(node, dict)
  )
  return {path.replace('/', '.'): value for path, value in fields.items()}
