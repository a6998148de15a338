"""Low-rank pairs of the experts of a layer, as PEFT fuses them.

transformers 5 keeps the experts of a layer in two parameters, `gate_up_proj`
and `down_proj`, and PEFT has one pair for each (`target_parameters`):
`lora_A` [experts * rank, in] and `lora_B` [out, rank * experts], the experts
running slowest in the first and fastest in the second. Their router is a
parameter too, with a pair of one.

Here every expert has a pair of its own, for its gate and for its up projection.
In a fused pair they are blocks: its rank is that of the gate and that of the up
projection together, and `lora_B` is zero where a kernel meets the rank of the
other. What is missing or of a smaller rank is filled with zeros. A fused pair
has one alpha; a block of another scale has the quotient in its `lora_B`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.checkpoints.peft_fused import (
  ENDS,
  Block,
  Fused,
  Shapes,
  Tensors,
  key_of,
  whole,
)
from jlora.checkpoints.peft_modules import Modules
from jlora.checkpoints.peft_scales import Strength, alpha_at
from jlora.checkpoints.peft_selection import Selection, most_frequent


def shared_pairs(
  strengths: Mapping[str, Strength], base: Modules
) -> dict[str, Fused]:
  """Returns fused pairs by parameter, each of one `lora_A` for all its parts.

  Args:
    strengths: Rank and alpha by parameter.
    base: Modules of the base.
  """
  found = {}
  for parameter, key in _keys_of(strengths, base).items():
    (rank, alpha), parts = strengths[parameter], base.parameters[parameter]
    blocks = whole(parts, (slice(0, rank),) * len(parts))
    found[parameter] = Fused(key, rank, alpha, parts, blocks)
  return found


def plan_fused(selection: Selection, base: Modules) -> dict[str, Fused]:
  """Returns the fused pairs that hold those of a selection, by parameter.

  Args:
    selection: What is trained.
    base: Modules of the base.
  """
  chosen = {
    p: parts
    for p, parts in base.parameters.items()
    if any(m in selection.pairs for part in parts for m in part)
  }
  keys = _keys_of(chosen, base)
  return {p: _plan(keys[p], parts, selection) for p, parts in chosen.items()}


def _plan(
  key: str, parts: tuple[tuple[str, ...], ...], selection: Selection
) -> Fused:
  pairs = {m: selection.pairs.get(m, (0, 0.0)) for part in parts for m in part}
  widths = [max(pairs[m][0] for m in part) for part in parts]
  alphas = {
    m: alpha_at(pair, sum(widths), selection.scaling)
    for m, pair in pairs.items()
    if pair[0]
  }
  usual = most_frequent(alphas.values())
  blocks = {}
  for i, part in enumerate(parts):
    start = sum(widths[:i])
    for expert, module in enumerate(part):
      if module in alphas:
        ranks = slice(start, start + pairs[module][0])
        blocks[module] = Block(i, expert, ranks, alphas[module] / usual)
  return Fused(key, sum(widths), usual, parts, blocks)


def _keys_of(parameters: Mapping[str, Any], base: Modules) -> dict[str, str]:
  """Returns what the names of tensors start with, by parameter.

  Of two parameters of one module, PEFT wraps the first one first.
  """
  chosen = [p for p in base.parameters if p in parameters]
  owners = [p.rpartition('.')[0] for p in chosen]
  keys = {}
  for i, (parameter, owner) in enumerate(zip(chosen, owners, strict=True)):
    inner = '.base_layer' * owners[i + 1 :].count(owner)
    keys[parameter] = f'base_model.model.{owner}{inner}'
  return keys


def fuse_shapes(shapes: Shapes, fused: Mapping[str, Fused]) -> Shapes:
  """Returns what a file holds where pairs are fused."""
  found = _alone(shapes, fused)
  for pair in fused.values():
    found |= pair.shapes(shapes)
  return found


def fuse_tensors(tensors: Tensors, fused: Mapping[str, Fused]) -> Tensors:
  """Returns the tensors of a file, of which those of modules are given."""
  found = _alone(tensors, fused)
  for pair in fused.values():
    found |= pair.fuse(tensors)
  return found


def split_tensors(tensors: Tensors, fused: Mapping[str, Fused]) -> Tensors:
  """Returns the tensors of a file, those of single modules for fused ones."""
  found = dict(tensors)
  for pair in fused.values():
    found |= pair.split(tensors)
  return found


def split_selection(
  selection: Selection,
  fused: Mapping[str, Fused],
  tensors: Tensors,
  trained: Selection | None,
  base: Modules,
) -> tuple[Selection, Mapping[str, Fused]]:
  """Returns what an adapter trains, and how fused pairs hold it.

  Args:
    selection: What adapter_config.json says.
    fused: From `shared_pairs`.
    tensors: Of the file.
    trained: What the adapter was made of, if that is known; it decides if the
      file holds just that. Else it is the values that do, see `in_blocks`.
    base: Modules of the base.
  """
  if trained and _holds(plan := plan_fused(trained, base), fused, tensors):
    pairs = {m: trained.pairs[m] for f in plan.values() for m in f.blocks}
    dropout = trained.dropout
  else:
    plan = {p: pair.in_blocks(tensors) for p, pair in fused.items()}
    strengths = (f.strengths(selection.scaling) for f in plan.values())
    pairs = {m: pair for found in strengths for m, pair in found.items()}
    dropout = selection.dropout
  inside = {m for f in fused.values() for m in f.modules}
  alone = {m: x for m, x in selection.pairs.items() if m not in inside}
  split = dataclasses.replace(
    selection, pairs={**alone, **pairs}, dropout=dropout
  )
  return split, plan


def _holds(
  plan: Mapping[str, Fused], fused: Mapping[str, Fused], tensors: Tensors
) -> bool:
  """Whether fused pairs are those of a plan."""
  both = (
    {p: (f.key, f.rank, f.alpha) for p, f in pairs.items()}
    for pairs in (plan, fused)
  )
  return next(both) == next(both) and all(
    f.holds(tensors) for f in plan.values()
  )


def _alone(x: Mapping[str, Any], fused: Mapping[str, Fused]) -> dict[str, Any]:
  """Returns what is not part of a fused pair."""
  modules = (m for f in fused.values() for m in f.modules)
  inside = {key_of(module, end) for module in modules for end in ENDS}
  return {key: value for key, value in x.items() if key not in inside}


def names_in_file(keys: Iterable[str], base: Modules) -> dict[str, str]:
  """Returns the keys that transformers names otherwise, with the name there.

  Args:
    keys: Of tensors of single modules.
    base: Modules of the base.
  """
  routers = {m: o for m, o in base.owners.items() if m not in base.experts}
  found = {}
  for key in keys:
    module, _, end = key.removeprefix('base_model.model.').rpartition('.')
    if routers.get(module, module) != module:
      found[key] = key_of(routers[module], end)
  return found
