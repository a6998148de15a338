"""Adapters that began with a part of the base, as plain LoRA, and back.

With W the base and a0, b0 the adapter before training, an init such as PiSSA
leaves W - s a0 b0 as the frozen part, so what training made of it is
W + s (a b - a0 b0): plain LoRA on W with [a, a0] and [b; -b0], of twice the
rank at the same scale.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from jlora.checkpoints.peft_layout import Layout, Node
from jlora.checkpoints.peft_leaves import Pair


def only_pairs(layouts: Mapping[str, Layout]) -> dict[str, Pair]:
  """Returns the layouts of low-rank pairs, by path."""
  return {path: x for path, x in layouts.items() if isinstance(x, Pair)}


def twice_the_rank(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
  """Returns the layouts of trained leaves with pairs of twice the rank."""
  return {
    path: dataclasses.replace(x, ranks=tuple(2 * rank for rank in x.ranks))
    if isinstance(x, Pair)
    else x
    for path, x in layouts.items()
  }


def add_initial(
  layouts: Mapping[str, Layout],
  nodes: Mapping[str, Node],
  initial: Mapping[str, Node],
) -> dict[str, Node]:
  """Returns nodes for `twice_the_rank`, with the initial pairs taken out.

  Args:
    layouts: Of the trained leaves, by path.
    nodes: What training made of them.
    initial: What they were before.
  """
  added = dict(nodes)
  for path, wide in _wide_pairs(layouts):
    old, new = (layouts[path].split(x[path]) for x in (initial, nodes))
    added[path] = wide.join(
      [_sum(*both) for both in zip(new, old, strict=True)]
    )
  return added


def take_initial(
  layouts: Mapping[str, Layout], nodes: Mapping[str, Node]
) -> tuple[dict[str, Node], dict[str, Node]]:
  """Returns the nodes and the initial pairs that `add_initial` was given.

  Args:
    layouts: Those that it was given.
    nodes: Those that it returned.
  """
  trained, initial = dict(nodes), {}
  for path, wide in _wide_pairs(layouts):
    layers = wide.split(nodes[path])
    trained[path] = layouts[path].join([_half(x, 0) for x in layers])
    initial[path] = layouts[path].join([_half(x, 1) for x in layers])
  return trained, initial


def _wide_pairs(layouts: Mapping[str, Layout]) -> Iterator[tuple[str, Pair]]:
  yield from only_pairs(twice_the_rank(layouts)).items()


def _sum(layer: Node, initial: Node) -> Node:
  """Returns the pair of twice the rank that is the difference of two."""
  a = np.concatenate([layer['a'], initial['a']], axis=1)
  b = np.concatenate([layer['b'], -initial['b']], axis=0)
  return {**layer, 'a': a, 'b': b}


def _half(layer: Node, index: int) -> Node:
  """Returns one of the pairs that `_sum` was given."""
  a = np.split(layer['a'], 2, axis=1)[index]
  b = np.split(layer['b'], 2, axis=0)[index]
  return {**layer, 'a': a, 'b': -b if index else b}
