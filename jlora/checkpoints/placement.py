"""A base's parameters on their way from disk to where they are used."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints import pieces
from jlora.checkpoints.bases import Base
from jlora.checkpoints.starts import Starts
from jlora.checkpoints.stored_codes import PackedLeaf, agree
from jlora.checkpoints.weights import StoredLeaf
from jlora.core.decompositions import Start
from jlora.core.lora import LoraSpec
from jlora.core.plan import Placeholder, Rows, is_frozen_leaf
from jlora.core.quantization import QuantSpec
from jlora.core.split import (
  Split,
  SplitLeaf,
  find_start,
  magnitude,
  make_split,
  split_leaf,
)
from jlora.core.tree import leaves_by_path, nest, nodes_by_path
from jlora.models import layout
from jlora.parallel.shardings import Shardings


def load_split(
  key: jax.Array,
  base: Base,
  spec: LoraSpec | None,
  quant: QuantSpec | None,
  dtype: Any,
  *,
  starts: Starts | None = None,
  shardings: Shardings | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Start]]:
  """Reads a base leaf by leaf and splits each one as it arrives.

  A process reads the pieces that its devices hold, one layer at a time, and
  quantizes them; so it never has a kernel whole that is cut over several
  processes. (Decompositions are the exception: an init that changes the base
  takes each leaf whole.) The result is that of `jlora.partition` on the whole
  base, in another dtype.

  Args:
    key: PRNG key of the adapters.
    base: From `open_base`.
    spec: What is trained, presets resolved; None for nothing.
    quant: What is quantized, presets resolved; None for nothing. Leaves that
      are stored in 4 bits stay as they are, see `stored_codes.agree`.
    dtype: Of the dense frozen leaves, and what the quantized ones compute in.
    starts: How adapters that are a part of the base started before, by path;
      None finds it.
    shardings: Where both halves lie; None for the default device.

  Returns:
    The frozen and the trainable half of the decoder's params, and how such
    adapters started, on the host.

  Raises:
    ConfigError: The specs do not fit the base.
    BaseModelError: A tensor is damaged.
  """
  quant = agree(quant, base.codes, base.config, spec)
  split = make_split(layout.shapes(base.config), spec, quant)
  packed = base.codes.leaves if base.codes else {}
  trained, found = {}, {}

  def place(path: str, leaf: StoredLeaf) -> Any:
    if path in split.plan.adapted and spec.changes_base:
      start = (starts or {}).get(path)
      parts = _split_whole(split, key, leaf, dtype, start, shardings)
      # Copies: training takes the arrays themselves.
      found[path] = jax.tree.map(np.array, parts.start)
    else:
      parts = _split_pieces(split, leaf, packed.get(path), dtype, shardings)
    if parts.trained:
      trained[path] = parts.trained
    return jax.block_until_ready(parts.frozen)

  frozen = base.load_params(place=place)
  trained = _complete(split, key, frozen, trained, shardings)
  return frozen, trained, found


def _split_whole(
  split: Split,
  key: jax.Array,
  leaf: StoredLeaf,
  dtype: Any,
  start: Start | None,
  shardings: Shardings | None,
) -> SplitLeaf:
  """Splits a leaf that a decomposition needs whole, then cuts its halves."""
  whole = jnp.asarray(leaf.read())
  parts = split_leaf(split, key, leaf.path, whole, dtype=dtype, start=start)
  if shardings is None:
    return parts
  frozen = pieces.place_whole(
    parts.frozen, shardings.of_leaf(leaf.path, parts.frozen)
  )
  trained = {
    kind: pieces.place_whole(x, shardings.of_trained(leaf.path, kind, x.shape))
    for kind, x in parts.trained.items()
  }
  return SplitLeaf(frozen, trained, parts.start)


def _split_pieces(
  split: Split,
  leaf: StoredLeaf,
  packed: PackedLeaf | None,
  dtype: Any,
  shardings: Shardings | None,
) -> SplitLeaf:
  """Splits a leaf as its pieces are read; what adapters add comes later."""
  path, trained = leaf.path, {}

  def sharding(kind: str, shape: tuple[int, ...]) -> Any:
    return shardings and shardings.of_trained(path, kind, shape)

  if path in split.plan.full:
    of_full = sharding('full', leaf.shape)
    trained['full'] = pieces.place_dense(leaf, jnp.float32, of_full)
    return SplitLeaf(Placeholder(leaf.shape, jnp.dtype(leaf.dtype)), trained)
  if path in split.plan.rows:
    rows = _read_rows(leaf, split.plan.rows[path])
    trained['rows'] = pieces.place_whole(rows, sharding('rows', rows.shape))
  return SplitLeaf(_freeze(split, leaf, packed, dtype, shardings), trained)


def _freeze(
  split: Split,
  leaf: StoredLeaf,
  packed: PackedLeaf | None,
  dtype: Any,
  shardings: Shardings | None,
) -> Any:
  """Returns a leaf as the frozen half holds it."""
  if leaf.path not in split.quantized:
    cuts = shardings and shardings.of_leaf(leaf.path, leaf)
    return pieces.place_dense(leaf, dtype, cuts)
  roles, quant = split.quantized[leaf.path], split.quant
  whole = pieces.quantized_shape(leaf, roles, quant)
  cuts = shardings and shardings.of_leaf(leaf.path, whole)
  if packed:
    codes = pieces.place_stored(packed, whole, cuts)
  else:
    codes = pieces.place_quantized(leaf, roles, quant, cuts)
  return codes.astype(quant.dtype or dtype)


def _read_rows(leaf: StoredLeaf, rows: Rows) -> np.ndarray:
  """Returns the rows that are trained, float32 [n, dim]."""
  leaf, whole = leaf.rounded(np.float32), slice(None)
  cuts = (slice(i, i + 1) for i in rows.ids)
  if rows.axis == 'in':
    return np.concatenate([leaf.read((cut, whole)) for cut in cuts])
  return np.concatenate([leaf.read((whole, cut)).T for cut in cuts])


def _complete(
  split: Split,
  key: jax.Array,
  frozen: dict[str, Any],
  trained: dict[str, Any],
  shardings: Shardings | None,
) -> dict[str, Any]:
  """Returns the trainable half, with the adapters that no kernel decides."""
  fresh = [path for path in split.plan.adapted if path not in trained]
  kernels = leaves_by_path(frozen, is_frozen_leaf)

  def draw(key: jax.Array, kernels: Mapping[str, Any]) -> dict[str, Any]:
    nodes = {}
    for path in fresh:
      start = find_start(split, key, path)
      node = {'a': start.a, 'b': start.b}
      if split.plan.adapted[path].dora:
        node['magnitude'] = magnitude(split, path, kernels[path], node)
      nodes[path] = node
    return nest(nodes)

  if fresh and shardings is not None:
    shapes = jax.eval_shape(draw, key, kernels)
    draw = jax.jit(draw, out_shardings=shardings.trainable(shapes))
  return nest(trained | nodes_by_path(draw(key, kernels)))


def load_frozen(
  base: Base,
  quant: QuantSpec | None,
  dtype: Any,
  *,
  whole: Collection[str] = (),
) -> dict[str, Any]:
  """Reads a base for an adapter that exists already.

  Args:
    base: From `open_base`.
    quant: As in `load_split`.
    dtype: As in `load_split`.
    whole: Patterns of the leaves that the adapter replaces.

  Returns:
    The frozen half of the decoder's params.
  """
  spec = LoraSpec(targets=(), train_full=tuple(whole)) if whole else None
  return load_split(jax.random.key(0), base, spec, quant, dtype)[0]
