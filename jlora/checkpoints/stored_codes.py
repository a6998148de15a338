"""Which leaves of a base are in codes already, and what to do with each.

A stacked leaf stays as stored where all its layers are in the same 4 bits and
their blocks lie within rows. Any other is decoded as it is read.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from jlora.checkpoints.packed import PackedTensor, Recipe
from jlora.checkpoints.weights import Index, listed
from jlora.core import tree
from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec, select_whole
from jlora.core.targets import ALL_LINEAR
from jlora.errors import BaseModelError, ConfigError
from jlora.models import families, layout
from jlora.models.config import DecoderConfig
from jlora.models.layout import Weight

_MIXED = 'some of their layers are in full precision'


@dataclasses.dataclass(frozen=True)
class PackedLeaf:
  """A kernel whose layers are in 4 bits in their files.

  Attributes:
    tensors: One for each place of the stack, or the only one.
    stack: Sizes of the axes over layers and experts.
  """

  tensors: tuple[PackedTensor, ...]
  stack: tuple[int, ...]

  def blocks(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes and scales of blocks, as a `QuantizedArray` has them.

    Args:
      index: One slice for each axis of its `scales`.

    Raises:
      BaseModelError: A scale is NaN or infinite.
    """
    depth = len(self.stack)
    places = np.arange(len(self.tensors)).reshape(self.stack)[index[:depth]]
    found: list[np.ndarray] = []
    for at, i in enumerate(places.flat):
      parts = _blocks(self.tensors[i], *index[depth:])
      found = found or [
        np.empty((places.size, *x.shape), x.dtype) for x in parts
      ]
      for array, part in zip(found, parts, strict=True):
        array[at] = part  # a layer is dropped before the next one comes
    codes, scales = (x.reshape(*places.shape, *x.shape[1:]) for x in found)
    return codes, scales

  def second_level(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns `scales2` and `offset`, where the scales are quantized in turn.

    Raises:
      BaseModelError: One is NaN or infinite.
    """
    scales2 = np.stack([_finite(x, x.scales2()) for x in self.tensors])
    offset = np.stack([x.offset for x in self.tensors])
    return scales2.reshape(*self.stack, -1), offset.reshape(self.stack)


def _blocks(
  tensor: PackedTensor, blocks: slice, outputs: slice
) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes [in / 2, out] and scales [in / block, out] of blocks."""
  out, size = tensor.shape
  block = tensor.recipe.block_size
  count, (first, last, _) = size // block, outputs.indices(out)
  codes = tensor.packed(first * size // 2, last * size // 2)
  codes = codes.reshape(-1, count, block // 2)[:, blocks]
  scales = tensor.scales(first * count, last * count)
  scales = _finite(tensor, scales).reshape(-1, count)[:, blocks]
  return codes.reshape(len(codes), -1).T, scales.T


def _finite(tensor: PackedTensor, scales: np.ndarray) -> np.ndarray:
  if not np.isfinite(scales).all():
    raise BaseModelError(
      f'{tensor.name} has scales that are NaN or infinite; the file is damaged'
    )
  return scales


@dataclasses.dataclass(frozen=True)
class StoredCodes:
  """What of a base is in 4 bits in its files.

  Attributes:
    recipe: How the leaves that stay as stored are quantized.
    leaves: These, by path; where there are none, all are decoded.
    decoded: Why any other leaf with 4-bit layers is decoded, by path.
    mixed: Number of weights of leaves that are decoded only since a layer is
      in full precision.
  """

  recipe: Recipe
  leaves: Mapping[str, PackedLeaf]
  decoded: Mapping[str, str]
  mixed: int = 0

  @property
  def quant(self) -> QuantSpec | None:
    """The spec of what stays as stored; None where nothing does."""
    if not self.leaves:
      return None
    paths = tuple(re.escape(path) for path in sorted(self.leaves))
    return QuantSpec(**dataclasses.asdict(self.recipe), targets=paths)

  def describe(self, quant: QuantSpec | None) -> str:
    """Returns how many leaves stay as stored, and why others are decoded.

    Args:
      quant: From `agree`.
    """
    reasons = collections.Counter(self.decoded.values())
    kept = len(tree.matching(quant.targets, self.leaves)) if quant else 0
    if kept < len(self.leaves):
      why = 'quant says so' if quant else 'quant is None'
      reasons[why] = len(self.leaves) - kept
    total = len(self.leaves) + len(self.decoded)
    text = f'stored in 4 bits: {total} leaves, {kept} of them used as they are'
    if not reasons:
      return text
    why = '; '.join(f'{n}, since {reason}' for reason, n in reasons.items())
    text = f'{text}; decoded: {why}'
    if not self.mixed:
      return text
    return (
      f'{text}. Whole stacks with such layers take {2 * self.mixed / 2**30:.2f}'
      f' GiB in 16 bits, not {self.mixed / 2**31:.2f} GiB in 4; a folder with'
      ' all layers in 4 bits, such as the plain -bnb-4bit one of a dynamic'
      ' quantization, avoids that'
    )


def find_codes(
  config: DecoderConfig, packed: Mapping[str, PackedTensor]
) -> StoredCodes | None:
  """Returns what of a base is in 4 bits; None for nothing.

  Args:
    config: The decoder's.
    packed: Its tensors in 4 bits, by name.
  """
  if not packed:
    return None
  whole, decoded, mixed = {}, {}, 0
  for weight in layout.weights(config):
    found = [packed[name] for name in weight.tensors if name in packed]
    if not found:
      continue
    if reason := _why_decoded(weight, found):
      decoded[weight.path] = reason
      mixed += math.prod(weight.shape) if reason == _MIXED else 0
    else:
      whole[weight.path] = PackedLeaf(tuple(found), weight.stack)
  recipes = collections.Counter(x.tensors[0].recipe for x in whole.values())
  recipes.update(dict.fromkeys((x.recipe for x in packed.values()), 0))
  recipe = recipes.most_common(1)[0][0]
  for path, leaf in list(whole.items()):
    if leaf.tensors[0].recipe != recipe:
      decoded[path] = f'most others are {recipe}'
      del whole[path]
  return StoredCodes(recipe, whole, decoded, mixed)


def _why_decoded(weight: Weight, found: list[PackedTensor]) -> str:
  """Returns why a leaf cannot stay as stored, or nothing."""
  size, block = weight.shape[-2], found[0].recipe.block_size
  if len(found) < len(weight.tensors):
    return _MIXED
  if not weight.linear or found[0].shape != weight.shape[:-3:-1]:
    return 'they are no linear layers of their own'
  if len({tensor.recipe for tensor in found}) > 1:
    return 'their layers are quantized in different ways'
  if size % block:
    return f'blocks of {block} do not divide rows of {size}'
  if not all(tensor.is_ours for tensor in found):
    return 'their codes have levels of their own'
  return ''


def agree(
  quant: QuantSpec | None,
  codes: StoredCodes | None,
  config: DecoderConfig,
  spec: LoraSpec | None = None,
) -> QuantSpec | None:
  """Returns how a base is quantized that may be so in its files.

  Codes are used as they are stored or decoded, never quantized again.

  Args:
    quant: What is asked for, presets resolved; None for full precision.
    codes: What the base's files hold; None where they hold no codes.
    config: The decoder's.
    spec: What is trained, presets resolved; None for nothing.

  Returns:
    `quant`, its targets those of the leaves that stay as stored; None where no
    leaf does, since all of them are trained whole or excluded.

  Raises:
    ConfigError: Another quantization is asked for, other leaves, or an init
      that changes the base.
  """
  if quant is None or codes is None:
    return quant
  if spec and spec.changes_base:
    raise ConfigError(
      f'lora.init {spec.init!r} takes a part out of the kernels before they are'
      ' quantized, but this base is stored in 4 bits'
    )
  asked = Recipe(
    format=quant.format,
    block_size=quant.block_size,
    double_quant=quant.double_quant,
  )
  _check_recipe(asked, codes)
  kept = _chosen(quant, codes, config)
  if spec:
    kept -= set(tree.matching(spec.train_full, layout.shapes(config)))
  if others := kept - set(codes.leaves):
    raise ConfigError(
      f'quant.targets asks for {listed(others)} in 4 bits, which the base'
      ' stores otherwise'
    )
  targets = tuple(map(re.escape, sorted(kept)))
  if not targets:
    return None
  return dataclasses.replace(quant, targets=targets, exclude=())


def _chosen(
  quant: QuantSpec, codes: StoredCodes, config: DecoderConfig
) -> set[str]:
  """Returns the paths that are asked for; of all-linear, those in codes."""
  quant = families.resolve(quant, config)
  if quant.targets == ALL_LINEAR:
    targets = tuple(map(re.escape, codes.leaves))
    quant = dataclasses.replace(quant, targets=targets)
  return set(select_whole(layout.shapes(config), quant))


def _check_recipe(asked: Recipe, codes: StoredCodes) -> None:
  stored = codes.recipe
  if not codes.leaves:
    raise ConfigError(
      f'quant asks for {asked}, but no leaf of this base can stay as stored'
      f' ({codes.describe(None)}), and codes are not quantized again'
    )
  if asked != stored:
    raise ConfigError(
      f'quant asks for {asked}, but the base is stored as {stored}, and codes'
      ' are not quantized again'
    )
