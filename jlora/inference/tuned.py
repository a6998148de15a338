"""A base with or without an adapter, ready to generate or to be merged."""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax

from jlora.checkpoints.adapters import (
  Adapter,
  check_base_leaves,
  check_fingerprint,
)
from jlora.checkpoints.bases import Base, open_base
from jlora.checkpoints.peft import load_adapter
from jlora.checkpoints.placement import load_params
from jlora.core.combination import combine
from jlora.core.lazy import densify, is_lazy
from jlora.core.lift import lift
from jlora.core.lora import INITS_THAT_CHANGE_THE_BASE, LoraSpec
from jlora.core.partition import freeze
from jlora.core.quantization import QuantSpec
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
    spec: What was trained; None without an adapter.
    quant: How the base is quantized here, or None.
    dtype: What it computes in.
    apply: The lifted decoder.
    metadata: What the adapter says of its training; empty without one.
  """

  base: Base
  frozen: Any
  trainable: dict[str, Any]
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

  def dense(self, dtype: Any) -> Any:
    """Returns plain parameters: the trained base plus the adapter's update.

    Args:
      dtype: Of every leaf; sums are formed in float32 and rounded once.
    """
    cast = functools.partial(densify, dtype=dtype)
    return jax.tree.map(cast, self.params, is_leaf=is_lazy)


def load_tuned(
  base_name: str,
  adapter_folder: os.PathLike[str] | str | None = None,
  *,
  quant: QuantSpec | None = None,
  dtype: str = 'auto',
  allow_other_base: bool = False,
) -> Tuned:
  """Loads a base and puts an adapter beside it.

  Args:
    base_name: As for `open_base`.
    adapter_folder: An adapter of jlora or PEFT; None for the base alone.
    quant: How the base is quantized. Where the adapter says how its base was
      quantized in training, that decides.
    dtype: 'auto', 'float32' or 'bfloat16'.
    allow_other_base: Whether an adapter of another base is accepted.

  Raises:
    BaseModelError: The base cannot be opened.
    AdapterError: The adapter is damaged or belongs to another base.
  """
  base = open_base(base_name)
  adapter = None
  if adapter_folder is not None:
    adapter = load_adapter(pathlib.Path(adapter_folder), base.config)
    same = check_fingerprint(
      adapter.metadata, base.sha256, allow_other_base=allow_other_base
    )
    if not same:
      warnings.warn(
        f'the adapter in {adapter_folder} is not known to belong to this base',
        stacklevel=2,
      )
    quant = _trained_quant(adapter, quant)
  if quant is not None:
    quant = families.resolve(quant, base.config)
  compute = compute_dtype(dtype)
  whole = adapter.spec.train_full if adapter else ()
  frozen = load_params(base, quant, compute, whole=whole)
  trainable = {}
  if adapter is not None:
    check_base_leaves(adapter, frozen)
    trainable = jax.tree.map(jax.numpy.asarray, adapter.trainable)
    frozen = freeze(frozen, whole)
  return Tuned(
    base=base,
    frozen=frozen,
    trainable=trainable,
    spec=adapter.spec if adapter else None,
    quant=quant,
    dtype=compute,
    apply=lift(Decoder(base.config, dtype=compute).apply),
    metadata=adapter.metadata if adapter else {},
  )


def _trained_quant(
  adapter: Adapter, given: QuantSpec | None
) -> QuantSpec | None:
  """Returns the quantization that an adapter was trained with, if it says."""
  if 'quantization' not in adapter.metadata:
    return given
  fields = adapter.metadata['quantization']
  trained = None if fields is None else QuantSpec(**fields)
  init = adapter.metadata.get('lora', {}).get('init')
  if trained is not None and init in INITS_THAT_CHANGE_THE_BASE:
    warnings.warn(
      f'the init {init!r} took a part of the base out before it was quantized,'
      ' and the adapter puts it back; so the base is used as'
      f' {given or "it is, not quantized"}, which differs from the trained'
      ' model by what quantization rounded off',
      stacklevel=3,
    )
    return given
  if given is not None and given != trained:
    warnings.warn(
      f'the adapter was trained on a base quantized as {trained}, not as'
      f' {given}; the former is used',
      stacklevel=3,
    )
  return trained
