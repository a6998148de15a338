"""The kinds of trained leaves that PEFT has a form for, one class each."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jlora.checkpoints.peft_layout import Layout, Node, Part, Shapes, Share
from jlora.checkpoints.peft_modules import Modules
from jlora.checkpoints.peft_selection import Selection
from jlora.errors import AdapterError
from jlora.models.config import DecoderConfig
from jlora.models.layout import weights

_MAGNITUDE = Part('lora_magnitude_vector')
_LINEAR = {
  'a': Part('lora_A.weight', transposed=True),
  'b': Part('lora_B.weight', transposed=True),
  'magnitude': _MAGNITUDE,
}
_EMBEDDING = {
  'a': Part('lora_embedding_A', transposed=True),
  'b': Part('lora_embedding_B', transposed=True),
  'magnitude': _MAGNITUDE,
}
_ROWS = {'rows': Part('token_adapter.trainable_tokens_delta')}


@dataclasses.dataclass(frozen=True)
class Pair(Layout):
  """A low-rank pair, as `lora_A` [rank, in] and `lora_B` [out, rank].

  Attributes:
    ranks: One a module; zero for one without a pair, which has no tensors.
    dora: Whether there is a magnitude.
  """

  ranks: tuple[int, ...]
  dora: bool

  def _shapes(self, rank: int) -> Shapes:
    size, out = self.weight.shape[-2:]
    shapes = {'a': (size, rank), 'b': (rank, out)}
    return {**shapes, 'magnitude': (out,)} if self.dora else shapes

  @property
  def shapes(self) -> Shapes:
    """Shapes with the largest rank, which the others are padded to."""
    stacked = self.weight.shape[:-2]
    shapes = self._shapes(max(self.ranks))
    return {name: (*stacked, *shape) for name, shape in shapes.items()}

  @property
  def shares(self) -> list[Share]:
    """One a module with a pair, and the twin."""
    parts = _LINEAR if self.weight.linear else _EMBEDDING
    shares = [
      Share(module, parts, self._shapes(rank))
      for module, rank in zip(self.weight.modules, self.ranks, strict=True)
      if rank
    ]
    if self.twin:
      sides = shares[0].shapes
      turned = {'a': sides['b'][::-1], 'b': sides['a'][::-1]}
      shares.append(Share(self.twin, _LINEAR, turned))
    return shares

  def split(self, node: Node) -> list[Node]:
    """Returns the pairs of single modules, without padding."""
    stacks = {name: self.stack(array) for name, array in node.items()}
    layers = []
    for i, rank in self._chosen():
      layer = {name: stack[i] for name, stack in stacks.items()}
      layer |= {'a': layer['a'][:, :rank], 'b': layer['b'][:rank]}
      layers.append(layer)
    return layers

  def join(self, layers: Sequence[Node]) -> Node:
    """Returns pairs of single modules as one, padded with zeros."""
    node = {n: np.zeros(s, np.float32) for n, s in self.shapes.items()}
    for (i, rank), layer in zip(self._chosen(), layers, strict=True):
      self.stack(node['a'])[i, :, :rank] = layer['a']
      self.stack(node['b'])[i, :rank] = layer['b']
      if self.dora:
        self.stack(node['magnitude'])[i] = layer['magnitude']
    return node

  def mirror(self, layer: Node) -> Node:
    """Returns the pair of a tied head: x @ (a b).T is (x @ b.T) @ a.T.

    PEFT stores it beside the embedding's with `ensure_weight_tying`. Without,
    the update of a tied embedding does not reach the head there.
    """
    return {'a': layer['b'].T, 'b': layer['a'].T}

  def check(self, node: Node) -> None:
    """Checks shapes and values, and that the padding is zero."""
    super().check(node)
    for i, rank in self._chosen():
      a, b = self.stack(node['a'])[i], self.stack(node['b'])[i]
      if a[:, rank:].any() or b[rank:].any():
        raise AdapterError(
          f'trainable has values beyond rank {rank} in layer {i} of'
          f' {self.weight.path!r}; the padding must be zero'
        )

  def _chosen(self) -> Iterator[tuple[int, int]]:
    """Yields the index and the rank of every layer with a pair."""
    return ((i, rank) for i, rank in enumerate(self.ranks) if rank)


@dataclasses.dataclass(frozen=True)
class Full(Layout):
  """A leaf that is stored whole.

  Attributes:
    suffix: What its keys have behind the module's name.
  """

  suffix: str = 'weight'

  @property
  def shapes(self) -> Shapes:
    """The shape of the leaf."""
    return {'full': self.weight.shape}

  @property
  def shares(self) -> list[Share]:
    """One a module."""
    parts = {'full': Part(self.suffix, self.weight.transposed)}
    shape = self.weight.shape[len(self.weight.stack) :]
    modules = (*self.weight.modules, *([self.twin] if self.twin else []))
    return [Share(module, parts, {'full': shape}) for module in modules]

  def split(self, node: Node) -> list[Node]:
    """Returns the layers of the leaf."""
    return [{'full': layer} for layer in self.stack(node['full'])]

  def join(self, layers: Sequence[Node]) -> Node:
    """Returns layers as one leaf."""
    return {'full': self.unstack(np.stack([x['full'] for x in layers]))}


@dataclasses.dataclass(frozen=True)
class Rows(Layout):
  """Single rows of an embedding or a head, whose values replace the base's.

  PEFT stores them once where the two are tied.

  Attributes:
    ids: Of the rows, in the order in which they lie in the file.
  """

  ids: tuple[int, ...]

  @property
  def shapes(self) -> Shapes:
    """Number of rows, and size of one."""
    axis = 0 if self.weight.linear else 1
    return {'rows': (len(self.ids), self.weight.shape[axis])}

  @property
  def shares(self) -> list[Share]:
    """The one module."""
    return [Share(self.weight.modules[0], _ROWS, self.shapes)]

  def split(self, node: Node) -> list[Node]:
    """Returns the rows in the order of the file."""
    return [{'rows': node['rows'][np.argsort(np.argsort(self.ids))]}]

  def join(self, layers: Sequence[Node]) -> Node:
    """Returns rows that lie as in the file, sorted by their ids."""
    return {'rows': layers[0]['rows'][np.argsort(self.ids)]}


def make_layouts(
  selection: Selection, config: DecoderConfig, base: Modules
) -> dict[str, Layout]:
  """Returns the layout of every trained leaf by its path.

  Args:
    selection: What is trained.
    config: The decoder's.
    base: Its modules.
  """
  layouts: dict[str, Layout] = {}
  for weight in weights(config):
    first, twin = weight.modules[0], base.twin(weight.modules[0])
    ranks = tuple(pair[0] if pair else 0 for pair in selection.pairs_of(weight))
    if any(ranks):
      dora = selection.variant == 'dora'
      layouts[weight.path] = Pair(weight, twin, ranks, dora)
    elif first in selection.saved:
      layouts[weight.path] = Full(weight, twin, weight.kind)
    elif first in selection.rows:
      layouts[weight.path] = Rows(weight, None, selection.rows[first])
  return layouts


def base_layouts(
  layouts: Mapping[str, Layout], base: Modules
) -> dict[str, Layout]:
  """Returns where PEFT adds the base's own embedding and head.

  It does so by default, beside their low-rank pairs.

  Args:
    layouts: Of the trained leaves.
    base: Modules of the base.
  """
  return {
    path: Full(layout.weight, layout.twin, 'base_layer.weight')
    for path, layout in layouts.items()
    if isinstance(layout, Pair)
    and layout.weight.modules[0] in (base.embedding, base.head)
  }
