"""What lies where on a mesh: rules for kernels, and all that follows them.

A rule names, for each axis of a leaf, the mesh axes that cut it. Codes and
scales are cut as their kernel is, on whole blocks; `a` as the kernel's input
axis and `b` as its output axis; an optimizer's moments as what they belong to.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.core import tree
from jlora.core.linear import Adapter
from jlora.core.plan import is_frozen_leaf
from jlora.core.quantized import is_quantized
from jlora.core.state import TrainState
from jlora.parallel.rules import (
  Cuts,
  Placement,
  Rules,
  devices_along,
  place,
  rule_of,
)

# Mesh axes whose devices work on other rows, so that each needs the kernel.
ROWS = ('data', 'fsdp')


@dataclasses.dataclass(frozen=True, eq=False)
class Shardings:
  """Where the parameters of a run lie.

  Attributes:
    mesh: The devices.
    placements: By the leaf's path.
    shapes: Of the leaves, by path, for the table.
    offload: Whether what an optimizer keeps lies in the hosts' memory.
  """

  mesh: Mesh
  placements: dict[str, Placement]
  shapes: dict[str, tuple[int, ...]]
  offload: bool = False

  def frozen(self, params: Any) -> Any:
    """Returns the shardings of a frozen half, in a tree like it."""

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
      if not (is_frozen_leaf(leaf) or hasattr(leaf, 'shape')):
        return leaf
      return self.of_leaf(tree.join(path), leaf)

    return jax.tree_util.tree_map_with_path(
      visit, params, is_leaf=is_frozen_leaf
    )

  def of_leaf(self, path: str, leaf: Any) -> Any:
    """Returns the sharding of one frozen leaf; of a quantized one, by field."""
    cuts = self.placements[path].cuts
    if not is_quantized(leaf):
      if is_frozen_leaf(leaf):
        return leaf  # a placeholder: there is nothing to place
      return self._named(cuts)
    whole = self._named(cuts[:-2])
    return dataclasses.replace(
      leaf,
      codes=self._named(cuts),
      scales=self._named(cuts),
      scales2=whole if leaf.scales2 is not None else None,
      offset=whole if leaf.offset is not None else None,
    )

  def of_plain(self, path: str, leaf: Any) -> NamedSharding:
    """Returns where a leaf lies once it is a plain array: as its codes did.

    Args:
      path: The leaf's.
      leaf: An array or a lazy leaf, or the shapes of one.
    """
    cuts = self.placements[path].cuts
    if len(cuts) != leaf.ndim:  # it has more axes than its matrix form
      return self._named(())
    return self._named(self._even(cuts, leaf.shape))

  def trainable(self, trainable: Any) -> Any:
    """Returns the shardings of a trainable half, in a tree like it."""

    def visit(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
      name, _, kind = tree.join(path).rpartition('/')
      return self.of_trained(name, kind, leaf.shape)

    return jax.tree_util.tree_map_with_path(visit, trainable)

  def of_trained(
    self, path: str, kind: str, shape: tuple[int, ...]
  ) -> NamedSharding:
    """Returns the sharding of what is trained of one leaf.

    Args:
      path: The leaf's.
      kind: What it is: 'a', 'b', 'magnitude', 'full' or 'rows'.
      shape: Its shape.
    """
    cuts = self.placements[path].cuts
    if kind == 'a':
      cuts = (*cuts[:-1], ())
    elif kind == 'b':
      cuts = (*cuts[:-2], (), cuts[-1])
    elif kind == 'magnitude':
      cuts = (*cuts[:-2], cuts[-1])
    elif kind == 'rows':
      cuts = ((), ())
    return self._named(self._even(cuts, shape))

  def state(self, state: TrainState) -> TrainState:
    """Returns the shardings of a training state, in a tree like it.

    What an optimizer keeps for each weight lies where the weight does: leaves
    whose path ends in that of a trained one, and which have its shape. With
    `offload` it lies in the memory of that device's host.
    """
    shapes = tree.leaves_by_path(state.trainable)
    trained = tree.leaves_by_path(self.trainable(state.trainable))

    def visit(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
      names = tree.join(path).split('/')
      ends = ('/'.join(names[i:]) for i in range(len(names)))
      end = next((end for end in ends if end in trained), None)
      if end is None or shapes[end].shape != leaf.shape:
        return self._named(())
      return trained[end]

    found = jax.tree_util.tree_map_with_path(visit, state)
    if not self.offload:
      return found
    host = jax.tree.map(_on_host, found.opt_state, state.opt_state)
    return dataclasses.replace(found, opt_state=host)

  def gather(self, path: str, part: Any) -> Any:
    """Brings a part of one layer to all devices with rows of their own.

    What `lift` takes as `gather`: codes are moved and decoded on each device,
    where XLA alone would move decoded kernels, or activations. Cuts along
    'tensor' stay.
    """
    if self.mesh.size == 1:
      return part
    *_, inputs, outputs = self.placements[path.partition('params/')[2]].cuts
    kept = (self._kept(inputs), self._kept(outputs))
    if isinstance(part, Adapter):
      a = self._constrain(part.a, (*kept[:1], ()))
      return part._replace(a=a, b=self._constrain(part.b, ((), *kept[1:])))
    if not is_quantized(part):
      return self._constrain(part, kept)
    return dataclasses.replace(
      part,
      codes=self._constrain(part.codes, kept),
      scales=self._constrain(part.scales, kept),
    )

  def _kept(self, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in ROWS)

  def _constrain(self, array: jax.Array, cuts: Cuts) -> jax.Array:
    """Returns an array [..., in, out] whose last axes are cut as said."""
    cuts = (*((),) * (array.ndim - len(cuts)), *cuts)
    sharding = self._named(self._even(cuts, array.shape))
    return jax.lax.with_sharding_constraint(array, sharding)

  def title(self) -> str:
    """Returns the title of the table: the axes of the mesh."""
    axes = (f'{name} {size}' for name, size in self.mesh.shape.items())
    return f'parameters over {self.mesh.size} devices: {", ".join(axes)}'

  def rows(self) -> Iterator[tuple[str, str]]:
    """Yields the lines of the table: paths, and how each leaf is cut."""
    for path, placement in self.placements.items():
      shape = zip(self.shapes[path], placement.cuts, strict=True)
      text = ' × '.join(
        f'{size}/{"·".join(names)}' if names else str(size)
        for size, names in shape
      )
      yield path, f'{text}  {placement.note}'.rstrip()

  def _named(self, cuts: Cuts) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*(x or None for x in cuts)))

  def _even(self, cuts: Cuts, shape: tuple[int, ...]) -> Cuts:
    """Returns the cuts without those that leave parts of unequal size."""
    return tuple(
      names if size % devices_along(self.mesh, names) == 0 else ()
      for names, size in zip(cuts, shape, strict=True)
    )


def _on_host(sharding: NamedSharding, leaf: Any) -> NamedSharding:
  """Returns a sharding in the host's memory; counters stay on the device."""
  return sharding.with_memory_kind('pinned_host') if leaf.shape else sharding


def is_on_host(shardings: Any) -> bool:
  """Whether something of a tree of shardings lies in the hosts' memory."""
  return any(s.memory_kind == 'pinned_host' for s in jax.tree.leaves(shardings))


def on_device(shardings: Any) -> Any:
  """Returns shardings like these in the memory of the devices."""
  return jax.tree.map(lambda s: s.with_memory_kind('device'), shardings)


def make_shardings(
  params: Mapping[str, Any],
  rules: Rules,
  mesh: Mesh,
  *,
  offload: bool = False,
) -> Shardings:
  """Returns where parameters lie.

  Args:
    params: Leaves by path: arrays, QuantizedArrays, or shapes of them.
    rules: The first that matches a leaf decides.
    mesh: The devices.
    offload: Whether what an optimizer keeps lies in the hosts' memory.

  Raises:
    ConfigError: No rule matches a leaf, or one does not fit it.
  """
  placements = {
    path: place(path, leaf, rule_of(path, rules), mesh)
    for path, leaf in params.items()
  }
  shapes = {path: tuple(leaf.shape) for path, leaf in params.items()}
  return Shardings(mesh, placements, shapes, offload)
