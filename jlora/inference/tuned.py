"""A base with or without an adapter, ready to generate or to be merged."""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.checkpoints.adapters import (
  Adapter,
  check_base_leaves,
  check_fingerprint,
  trained_quant,
  trained_spec,
)
from jlora.checkpoints.bases import Base, open_base
from jlora.checkpoints.peft import load_adapter, split_initial
from jlora.checkpoints.placement import load_frozen, load_split
from jlora.checkpoints.starts import Starts
from jlora.core.combination import combine
from jlora.core.decompositions import Start
from jlora.core.lazy import densify, is_lazy
from jlora.core.lift import lift
from jlora.core.lora import INITS_THAT_CHANGE_THE_BASE, LoraSpec
from jlora.core.plan import is_frozen_leaf
from jlora.core.quantization import QuantSpec
from jlora.core.quantized import QuantizedArray, is_quantized
from jlora.core.tree import leaves_by_path, nodes_by_path
from jlora.inference.plain import make_plain
from jlora.models import families
from jlora.models.decoder import Decoder
from jlora.parallel.devices import compute_dtype


@dataclasses.dataclass(frozen=True)
class Tuned:
  """A model to run.

  Attributes:
    base: The base model.
    frozen: Its parameters, without the leaves that the adapter replaces.
    trainable: The adapter's parameters; empty without one.
    starts: How its low-rank pairs started, by path, where they began as a part
      of the base; else empty.
    spec: What was trained; None without an adapter.
    quant: How the base is quantized here, or None.
    dtype: What it computes in.
    apply: The lifted decoder.
    metadata: What the adapter says of its training; empty without one.
  """

  base: Base
  frozen: Any
  trainable: dict[str, Any]
  starts: Starts
  spec: LoraSpec | None
  quant: QuantSpec | None
  dtype: Any
  apply: Callable[..., Any]
  metadata: dict[str, Any]

  @property
  def params(self) -> Any:
    """The parameters with lazy leaves, for `apply`."""
    if self.spec is None:
      return self.frozen
    return combine(self.frozen, self.trainable, self.spec)

  @property
  def codes(self) -> dict[str, QuantizedArray]:
    """The frozen kernels that are in codes, by path."""
    leaves = leaves_by_path(self.frozen, is_frozen_leaf)
    return {path: x for path, x in leaves.items() if is_quantized(x)}

  @property
  def whole(self) -> set[str]:
    """Paths of the leaves that the adapter replaces."""
    nodes = nodes_by_path(self.trainable)
    return {path for path, node in nodes.items() if 'full' in node}

  def dense(self, dtype: Any) -> Any:
    """Returns plain parameters: the trained base plus the adapter's update.

    Args:
      dtype: Of every leaf; sums are formed in float32 and rounded once.
    """
    cast = functools.partial(densify, dtype=dtype)
    return jax.tree.map(cast, self.params, is_leaf=is_lazy)

  def merged(self) -> 'Tuned':
    """Returns the same model as a base alone, on plain arrays in `dtype`.

    It is `dense(dtype)`, formed a layer at a time: tokens come faster, for
    the memory of dense weights. In 16 bits the sums are rounded, by which the
    model differs from this one as its merged export does.
    """
    return dataclasses.replace(
      self,
      frozen=make_plain(self.params, self.dtype),
      trainable={},
      starts={},
      spec=None,
      quant=None,
      metadata={},
    )


Check = Callable[[Base, LoraSpec | None, QuantSpec | None], None]


def load_tuned(
  base_name: str,
  adapter_folder: os.PathLike[str] | str | None = None,
  *,
  quant: QuantSpec | None = None,
  dtype: str = 'auto',
  allow_other_base: bool = False,
  check: Check = lambda base, spec, quant: None,
) -> Tuned:
  """Loads a base and puts an adapter beside it.

  Args:
    base_name: As for `open_base`.
    adapter_folder: An adapter of jlora or PEFT; None for the base alone.
    quant: How the base is quantized; None is as its files have it. Where the
      adapter says how its base was quantized in training, that decides.
    dtype: 'auto', 'float32' or 'bfloat16'.
    allow_other_base: Whether an adapter of another base is accepted.
    check: Called before any weights of the base are read, with the base, what
      the adapter trains (None without one) and how the base is quantized here;
      it raises what there is to refuse.

  Raises:
    BaseModelError: The base cannot be opened.
    AdapterError: The adapter is damaged or belongs to another base.
  """
  base = open_base(base_name)
  compute = compute_dtype(dtype)
  if adapter_folder is None:
    quant = _default_quant(quant, base)
    check(base, None, quant)
    parts = _Parts(load_frozen(base, quant, compute), {}, None, {})
    return _tuned(base, parts, quant, compute, {})
  adapter = load_adapter(pathlib.Path(adapter_folder), base.config)
  same = check_fingerprint(
    adapter.metadata, base.sha256, allow_other_base=allow_other_base
  )
  if not same:
    warnings.warn(
      f'the adapter in {adapter_folder} is not known to belong to this base',
      stacklevel=2,
    )
  again = same and _can_start_again(adapter)
  if 'quantization' not in adapter.metadata:
    quant = _default_quant(quant, base)
  quant = quant and families.resolve(quant, base.config)
  quant = _trained_quant(adapter, quant, again=again)
  spec = trained_spec(adapter.metadata) if again else adapter.spec
  check(base, spec, quant)
  load = _start_again if again else _put_beside
  parts = load(adapter, base, quant, compute)
  return _tuned(base, parts, quant, compute, adapter.metadata)


def _default_quant(quant: QuantSpec | None, base: Base) -> QuantSpec | None:
  """Returns what is asked for, or else how the base's files are quantized."""
  if quant is None and base.codes:
    quant = base.codes.quant
  return quant and families.resolve(quant, base.config)


class _Parts(NamedTuple):
  """What is put together: see `Tuned`."""

  frozen: Any
  trainable: dict[str, Any]
  spec: LoraSpec | None
  starts: Starts


def _tuned(
  base: Base,
  parts: _Parts,
  quant: QuantSpec | None,
  dtype: Any,
  metadata: dict[str, Any],
) -> Tuned:
  return Tuned(
    base=base,
    frozen=parts.frozen,
    trainable=jax.tree.map(jnp.asarray, parts.trainable),
    starts=parts.starts,
    spec=parts.spec,
    quant=quant,
    dtype=dtype,
    apply=lift(Decoder(base.config, dtype=dtype).apply),
    metadata=metadata,
  )


def _put_beside(
  adapter: Adapter, base: Base, quant: QuantSpec | None, dtype: Any
) -> _Parts:
  """Puts an adapter beside the base as it is."""
  spec = adapter.spec
  frozen = load_frozen(base, quant, dtype, whole=spec.train_full)
  check_base_leaves(adapter, frozen)
  return _Parts(frozen, adapter.trainable, spec, {})


def _can_start_again(adapter: Adapter) -> bool:
  """Whether it is known how an adapter began as a part of its base."""
  init = trained_spec(adapter.metadata).init
  if init not in INITS_THAT_CHANGE_THE_BASE:
    return False
  known = init != 'loftq' or bool(adapter.starts)
  return known and 'quantization' in adapter.metadata


def _start_again(
  adapter: Adapter, base: Base, quant: QuantSpec | None, dtype: Any
) -> _Parts:
  """Takes the start of an adapter out of its base, as training began.

  The file holds plain LoRA of twice the rank for the base as it was; in 4 bits
  that would be another model, for what was quantized is what the init left.
  """
  trained, initial, spec = split_initial(adapter, base.config)
  starts = adapter.starts or {
    path: Start(node['a'], node['b'])
    for path, node in nodes_by_path(initial).items()
  }
  key = jax.random.key(0)  # these inits draw nothing
  frozen, _, starts = load_split(key, base, spec, quant, dtype, starts=starts)
  return _Parts(frozen, trained, spec, starts)


def _trained_quant(
  adapter: Adapter, given: QuantSpec | None, *, again: bool
) -> QuantSpec | None:
  """Returns the quantization that an adapter was trained with, if it says.

  Args:
    adapter: The adapter.
    given: What the caller asks for, presets resolved.
    again: Whether the adapter's start is taken out of the base again.
  """
  metadata = adapter.metadata
  trained = trained_quant(metadata)
  if 'quantization' not in metadata or trained == given:
    return given
  if trained_spec(metadata).changes_base and not again:
    warnings.warn(
      'the adapter began as a part of a base that was then quantized, which'
      f' cannot be had here; the base is used as {given or "it is"}, and'
      ' differs by what quantization rounded off',
      stacklevel=3,
    )
    return given
  if given is not None:
    warnings.warn(
      f'the adapter was trained on a base quantized as {trained}, not as'
      f' {given}; the former is used',
      stacklevel=3,
    )
  return trained
