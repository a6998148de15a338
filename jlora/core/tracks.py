"""A parameter on its way through a traced program, its axes kept apart."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jlora.core.axes import Roles
from jlora.core.views import LAYOUT, Atom, View


@dataclasses.dataclass(frozen=True)
class Track:
  """A parameter on its way through a program.

  Attributes:
    path: Where it stands in the parameters.
    ndim: Number of its axes.
    view: The layout in which it is seen; atoms name the parameter's axes.
    looped: Axes that loops and indices went through.
  """

  path: str
  ndim: int
  view: View
  looped: tuple[int, ...] = ()

  def enters(self, axis: int) -> 'Track':
    """Returns what one entry along an axis of the array is."""
    groups = self.view.groups
    rest = View(groups[:axis] + groups[axis + 1 :])
    looped = (*self.looped, *axes_of(groups[axis]))
    return dataclasses.replace(self, view=rest, looped=looped)


def make_track(path: str, shape: Sequence[int]) -> Track:
  """Returns a parameter at the start of a program.

  Args:
    path: Where it stands in the parameters.
    shape: Its shape.
  """
  view = View(tuple((Atom(i, size, 1),) for i, size in enumerate(shape)))
  return Track(path, len(shape), view)


def axes_of(atoms: Iterable[Atom]) -> list[int]:
  """Returns the parameter's axes that atoms run over."""
  return [atom.axis for atom in atoms if atom.axis is not None]


class Use(NamedTuple):
  """How a product uses a parameter: which of its axes are what.

  Attributes:
    ndim: Number of the parameter's axes.
    looped: Axes that a loop or an index goes through.
    parallel: Axes that go in parallel, such as experts.
    inputs: Axes that are summed over.
    is_lookup: Whether its rows are looked up.
  """

  ndim: int
  looped: frozenset[int]
  parallel: frozenset[int]
  inputs: frozenset[int]
  is_lookup: bool = False

  @property
  def roles(self) -> Roles:
    """The roles of all axes; those that are nothing else are outputs."""
    stacked = self.looped | self.parallel
    inputs = self.inputs - stacked
    outputs = frozenset(range(self.ndim)) - stacked - inputs
    words = ('vocab', 'embed') if self.is_lookup else ('in', 'out')
    names: dict[int, str] = {}
    for axes, word in (
      (self.looped, 'layers'),
      (self.parallel - self.looped, 'experts'),
      (inputs, words[0]),
      (outputs, words[1]),
    ):
      for i, axis in enumerate(sorted(axes)):
        names[axis] = f'{word}_{i}' if i else word
    sides = [
      tuple(names[i] for i in sorted(s)) for s in (stacked, inputs, outputs)
    ]
    canonical = [name for side in sides for name in side]
    layout = [names[axis] for axis in range(self.ndim)]
    order = tuple(canonical.index(name) - self.ndim for name in layout)
    return Roles(*sides, order=() if layout == canonical else order)


def relaid(track: Track, name: str, params: dict[str, Any]) -> Track | None:
  """Returns a parameter in another layout; a squeezed axis is a layer's.

  Args:
    track: The parameter.
    name: A primitive of `views.LAYOUT`.
    params: Its parameters.
  """
  gone = params['dimensions'] if name == 'squeeze' else ()
  looped = [a for axis in gone for a in axes_of(track.view.groups[axis])]
  view = LAYOUT[name](track.view, params)
  return view and dataclasses.replace(
    track, view=view, looped=(*track.looped, *looped)
  )


def part_of(track: Track | None, shape: Sequence[int]) -> Track | None:
  """Returns a part of a parameter; a single entry of an axis is a layer.

  Args:
    track: The parameter.
    shape: Of the part.
  """
  if track is None:
    return None
  groups, looped = list(track.view.groups), list(track.looped)
  for axis, (size, before) in enumerate(
    zip(shape, track.view.shape, strict=True)
  ):
    if size == 1 < before:
      looped += axes_of(groups[axis])
      groups[axis] = ()
    elif size < before:
      groups[axis] = (groups[axis][0]._replace(size=size),)
  return dataclasses.replace(
    track, view=View(tuple(groups)), looped=tuple(looped)
  )
