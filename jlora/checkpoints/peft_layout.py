"""How a trained leaf lies in PEFT's file.

A stacked leaf is one module a layer, or an expert, there, and matrices lie as
[out, in].
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jlora.checkpoints.peft_tensors import check_finite
from jlora.errors import AdapterError
from jlora.models.layout import Weight

Node = Mapping[str, np.ndarray]  # of `trainable`: all of a leaf, or one layer
Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor of a module.

  Attributes:
    suffix: What its key has behind the module's name.
    transposed: Whether its axes lie in reverse.
  """

  suffix: str
  transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Share:
  """What one module holds of a leaf.

  Attributes:
    module: The module's name.
    parts: Its tensors, by their names in `trainable`.
    shapes: Their shapes there.
  """

  module: str
  parts: Mapping[str, Part]
  shapes: Shapes

  def tensor_shapes(self) -> Shapes:
    """Returns the shapes in the file, by key."""
    return {
      self._key(name): shape[::-1] if self.parts[name].transposed else shape
      for name, shape in self.shapes.items()
    }

  def write(self, layer: Node) -> Tensors:
    """Returns tensors by key."""
    return {
      self._key(name): np.ascontiguousarray(self._turn(name, layer[name]))
      for name in self.shapes
    }

  def read(self, tensors: Tensors) -> Node:
    """Returns what the tensors hold of this module."""
    return {n: self._turn(n, tensors[self._key(n)]) for n in self.shapes}

  def _key(self, name: str) -> str:
    return f'base_model.model.{self.module}.{self.parts[name].suffix}'

  def _turn(self, name: str, array: np.ndarray) -> np.ndarray:
    return array.T if self.parts[name].transposed else array


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
  """One trained leaf between `trainable` and the file.

  Attributes:
    weight: The leaf.
    twin: A module that shares the leaf's tensor and is stored too, or None.
  """

  weight: Weight
  twin: str | None

  @property
  @abc.abstractmethod
  def shapes(self) -> Shapes:
    """Shapes of the node in `trainable`."""

  @property
  @abc.abstractmethod
  def shares(self) -> list[Share]:
    """What each module holds; the twin is the last."""

  @abc.abstractmethod
  def split(self, node: Node) -> list[Node]:
    """Returns what each module but the twin holds of a node."""

  @abc.abstractmethod
  def join(self, layers: Sequence[Node]) -> Node:
    """Returns the node of which `split` gives `layers`."""

  def mirror(self, layer: Node) -> Node:
    """Returns what the twin holds where the leaf's own module has `layer`."""
    return layer

  def tensor_shapes(self) -> Shapes:
    """Returns the shapes of all tensors in the file, by key."""
    found: dict[str, tuple[int, ...]] = {}
    for share in self.shares:
      found |= share.tensor_shapes()
    return found

  def write(self, node: Node) -> Tensors:
    """Returns the tensors of a node by key."""
    layers = self.split(node)
    if self.twin:
      layers.append(self.mirror(layers[0]))
    pairs = zip(self.shares, layers, strict=True)
    return {k: t for s, layer in pairs for k, t in s.write(layer).items()}

  def read(self, tensors: Tensors) -> Node:
    """Returns the node that tensors hold.

    Raises:
      AdapterError: A module holds another value than its twin.
    """
    layers = [share.read(tensors) for share in self.shares]
    if self.twin:
      twin, expected = layers.pop(), self.mirror(layers[0])
      if any(not np.array_equal(twin[name], expected[name]) for name in twin):
        raise AdapterError(
          f'the adapter has another {self.twin} than {self.weight.modules[0]},'
          ' but this base has one tensor for both (tie_word_embeddings)'
        )
    return self.join(layers)

  def check(self, node: Node) -> None:
    """Checks that a node of `trainable` can be written.

    Raises:
      AdapterError: It has other shapes, or values that are not finite.
    """
    found = {name: array.shape for name, array in node.items()}
    if found != self.shapes:
      raise AdapterError(
        f'trainable has {found} at {self.weight.path!r}; base and spec need'
        f' {self.shapes}'
      )
    for name, array in node.items():
      check_finite(f'{self.weight.path}/{name}', array)

  def stack(self, array: np.ndarray) -> np.ndarray:
    """Returns an array with a leading axis over the leaf's modules."""
    inner = array.shape[len(self.weight.stack) :]
    return array.reshape(len(self.weight.modules), *inner)

  def unstack(self, array: np.ndarray) -> np.ndarray:
    """Returns an array with the leaf's own leading axes again."""
    return array.reshape(*self.weight.stack, *array.shape[1:])
