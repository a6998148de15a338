"""What a run must fulfil before its base is read."""

import dataclasses

from jlora.checkpoints.bases import Base
from jlora.checkpoints.peft_selection import select
from jlora.checkpoints.stored_codes import StoredCodes, agree
from jlora.core.lora import LoraSpec
from jlora.core.plan import make_plan
from jlora.core.quantization import QuantSpec
from jlora.core.split import make_split
from jlora.core.tree import leaves_by_path, nest
from jlora.errors import ConfigError
from jlora.models import families, layout
from jlora.models.config import DecoderConfig
from jlora.parallel import processes
from jlora.training.run_spec import RunSpec


def resolve(spec: RunSpec, config: DecoderConfig) -> RunSpec:
  """Returns the run with presets and axes of its base's family.

  Args:
    spec: The resolved config.
    config: The sizes of the base that it trains.

  Raises:
    ConfigError: The rows are longer than the base was trained for, or the
      specs name something that this base does not have.
    AdapterError: There is no file for what would be trained.
  """
  limit = config.max_positions
  if spec.data.max_length > limit:
    raise ConfigError(
      f'data.max_length is {spec.data.max_length}, but this base was trained'
      f' for {limit} positions; lower it'
    )
  quant = spec.quant and families.resolve(spec.quant, config)
  lora = families.resolve(spec.lora, config)
  shapes = layout.shapes(config)
  whole = make_plan(shapes, lora).full
  if quant is not None and set(whole) == set(shapes):
    raise ConfigError(
      'quant is set, but lora.train_full takes every leaf, so there is nothing'
      ' to quantize; set quant to None, as experiments/full.py does'
    )
  make_split(leaves_by_path(nest(shapes)), lora, quant)  # or refuses
  if spec.is_adapter:
    select(lora, config)  # or refuses what could not be written at the end
  return dataclasses.replace(spec, lora=lora, quant=quant)


def as_stored(spec: RunSpec, base: Base) -> RunSpec:
  """Returns the run with its base's codes as they are stored, if it has any.

  Args:
    spec: The run, resolved for its base.
    base: The base.

  Raises:
    ConfigError: The run asks for another quantization.
  """
  try:
    quant = agree(spec.quant, base.codes, base.config, spec.lora)
  except ConfigError as error:
    advice = _advise(spec.quant, spec.lora, base.codes)
    raise ConfigError(f'{error}; {advice}') from error
  return dataclasses.replace(spec, quant=quant)


def _advise(quant: QuantSpec, lora: LoraSpec, codes: StoredCodes) -> str:
  """Returns what to change so that a base can stay as it is stored."""
  if lora.changes_base:
    return (
      'use lora.init=lora, set quant to None, or name the unquantized model'
    )
  if not codes.leaves:
    return 'set quant to None'
  changes = [
    f'--config.quant.{field}={value}'
    for field, value in dataclasses.asdict(codes.recipe).items()
    if value != getattr(quant, field)
  ]
  if changes:
    return f'use {" ".join(changes)}, or name the unquantized model'
  return (
    'leave it out, or use quant.targets=all-linear for what is stored in 4 bits'
  )


def check_rows(spec: RunSpec, devices: int) -> None:
  """Requires that devices can share the rows of a microbatch.

  Args:
    spec: The run.
    devices: How many work on rows of their own.

  Raises:
    ConfigError: They cannot.
  """
  rows = spec.train.batch_size // spec.train.accumulate
  if rows % devices:
    raise ConfigError(
      f'train.batch_size {spec.train.batch_size} over train.accumulate'
      f' {spec.train.accumulate} gives {rows} rows, which {devices} devices'
      ' cannot share; make it a multiple'
    )


def require_one_run(spec: RunSpec, base: Base, fingerprint: str) -> None:
  """Requires that all processes train the same.

  Args:
    spec: The run.
    base: Its base, as this process sees it.
    fingerprint: Of its examples, likewise.

  Raises:
    ConfigError: Another process has others.
  """
  processes.require_same('config', spec.to_json())
  sizes = [path.stat().st_size for path in base.model.paths]
  processes.require_same('base', f'{base.config} {sizes}')
  processes.require_same('data', fingerprint)
