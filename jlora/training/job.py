"""Everything a run needs, built once and checked before the first step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from rich.console import Console

from jlora.checkpoints.bases import Base, open_base
from jlora.checkpoints.starts import Starts
from jlora.core.decompositions import Start
from jlora.core.description import Description, describe
from jlora.core.lift import lift
from jlora.core.plan import make_plan
from jlora.core.split import make_split
from jlora.core.state import TrainState
from jlora.core.tree import leaves_by_path, nest
from jlora.data.batch import Batch
from jlora.data.loader import Loader, digest, eval_batches
from jlora.data.prepare import Prepared, prepare
from jlora.data.report import show_examples
from jlora.errors import ConfigError, DataError
from jlora.models import families
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.parallel import processes
from jlora.parallel.mesh import by_example, make_mesh
from jlora.parallel.shardings import Shardings
from jlora.training.footprint import Footprint, measure
from jlora.training.halves import load_halves
from jlora.training.optimizers import make_schedule
from jlora.training.program import abstract_batch, make_program
from jlora.training.run_spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Job:
  """A run that is ready to start.

  Attributes:
    spec: The run, presets resolved for its base.
    base: The base model.
    data: Examples, conversations and their verifier.
    digest: Of all examples.
    loader: Batches by step.
    held_out: Batches of the held-out loss.
    steps: Updates of the whole run.
    frozen: The frozen half of the parameters.
    state: The state before the first step.
    starts: How adapters started that are a part of the base, by path.
    step: (state, frozen, batch) -> (state, metrics), compiled; it donates the
      state.
    evaluate: (trainable, frozen, batch) -> (summed loss, tokens).
    apply: The lifted decoder, for generation.
    dtype: What the base computes in.
    schedule: Learning rate by step.
    description: What is trained, quantized and frozen.
    shardings: Where the parameters lie.
    footprint: Parameters and bytes.
  """

  spec: RunSpec
  base: Base
  data: Prepared
  digest: str
  loader: Loader
  held_out: list[Batch]
  steps: int
  frozen: Any
  state: TrainState
  starts: dict[str, Start]
  step: Callable[..., Any]
  evaluate: Callable[..., Any]
  apply: Callable[..., Any]
  dtype: Any
  schedule: optax.Schedule
  description: Description
  shardings: Shardings
  footprint: Footprint

  @property
  def origin(self) -> dict[str, str]:
    """Digests of what a continued run must have as it began."""
    return {'base': self.base.sha256, 'data': self.digest}

  def batch(self, step: int) -> Batch:
    """Returns the batch of a step on the devices of all processes.

    Each process makes the rows that its own devices hold.

    Args:
      step: Counts from zero.
    """
    count, sharding = self.loader.batch_size, self._by_example
    rows = processes.rows_here(count, sharding)

    def place(part: np.ndarray) -> jax.Array:
      return processes.spread(part, sharding, rows=count, first=rows.start)

    return jax.tree.map(place, self.loader.batch(step, rows))

  def place(self, batch: Batch) -> Batch:
    """Puts a whole batch on the devices of all processes.

    Args:
      batch: Of NumPy arrays, the same in every process.
    """
    return jax.tree.map(
      lambda array: processes.spread(array, self._by_example), batch
    )

  @property
  def _by_example(self) -> NamedSharding:
    return by_example(self.shardings.mesh)

  def check_origin(self, origin: dict[str, str]) -> None:
    """Requires the base and the data that a run began with.

    Args:
      origin: Of the run that is continued.

    Raises:
      DataError: Base or data are others now.
    """
    for name, found in self.origin.items():
      if found != origin[name]:
        raise DataError(
          f'this run began with a {name} of sha256 {origin[name]}, and now it'
          f' has {found}; restore the {name}, or choose another --workdir'
        )


def build(spec: RunSpec, console: Console, starts: Starts | None = None) -> Job:
  """Loads base and data, splits the parameters and compiles the step.

  Args:
    spec: The resolved config.
    console: Where the stages are told.
    starts: Of the run that is continued or evaluated, see `load_halves`.

  Raises:
    JloraError: Something in base, data or spec does not fit together.
  """
  mesh = make_mesh(spec.mesh.data, spec.mesh.fsdp, spec.mesh.tensor)
  check_rows(spec, mesh.shape['data'] * mesh.shape['fsdp'])
  base = open_base(spec.base)
  console.print(base.describe(), highlight=False)
  spec = resolve(spec, base.config)
  data = load_data(spec, base)
  show_examples(data.train, base.tokenizer, data.report, console)
  loader = make_loader(spec, data)
  steps = _count_steps(spec, loader)

  if spec.lora.changes_base and not starts:
    console.print(f'starting the adapters from the base: {spec.lora.init}')
  _compare(spec, base, data)
  loaded = load_halves(spec, base, mesh, steps, starts)
  frozen, state, dtype = loaded.frozen, loaded.state, loaded.dtype
  gather = loaded.shardings.gather
  program = make_program(spec, base.config, loaded, mesh)

  batch = abstract_batch(spec, mesh)
  compiled = program.step.lower(state, frozen, batch).compile()
  shapes = families.shapes(base.config, dtype)
  description = describe(shapes, spec.lora, quant=spec.quant)
  return Job(
    spec=spec,
    base=base,
    data=data,
    digest=digest((*data.train, *data.eval)),
    loader=loader,
    held_out=_held_out(spec, data),
    steps=steps,
    frozen=frozen,
    state=state,
    starts=loaded.starts,
    step=compiled,
    evaluate=program.evaluate,
    apply=lift(Decoder(base.config, dtype=dtype).apply, gather=gather),
    dtype=dtype,
    schedule=make_schedule(spec.optim, steps),
    description=description,
    shardings=loaded.shardings,
    footprint=measure(frozen, state, compiled, trained=description.parameters),
  )


def resolve(spec: RunSpec, config: DecoderConfig) -> RunSpec:
  """Returns the run with presets and axes of its base's family.

  Args:
    spec: The resolved config.
    config: The sizes of the base that it trains.

  Raises:
    ConfigError: The rows are longer than the base was trained for, or the
      specs name something that this base does not have.
  """
  limit = config.max_positions
  if spec.data.max_length > limit:
    raise ConfigError(
      f'data.max_length is {spec.data.max_length}, but this base was trained'
      f' for {limit} positions; lower it'
    )
  quant = spec.quant and families.resolve(spec.quant, config)
  lora = families.resolve(spec.lora, config)
  shapes = families.shapes(config)
  whole = make_plan(shapes, lora).full
  if quant is not None and set(whole) == set(shapes):
    raise ConfigError(
      'quant is set, but lora.train_full takes every leaf, so there is nothing'
      ' to quantize; set quant to None, as experiments/full.py does'
    )
  make_split(leaves_by_path(nest(shapes)), lora, quant)  # or refuses
  return dataclasses.replace(spec, lora=lora, quant=quant)


def load_data(spec: RunSpec, base: Base) -> Prepared:
  """Returns the examples of a run, tokenized for its base.

  Args:
    spec: The run.
    base: Its base.

  Raises:
    DataError: A source is missing, malformed or too small.
  """
  return prepare(
    spec.data.train,
    spec.data.eval,
    base.tokenizer,
    max_length=spec.data.max_length,
    pack=spec.data.pack,
    seed=spec.seed,
    train_examples=spec.data.train_examples,
    eval_examples=spec.data.eval_examples,
    vocab_size=base.config.vocab_size,
  )


def make_loader(spec: RunSpec, data: Prepared) -> Loader:
  """Returns the batches of a run by step.

  Args:
    spec: The run.
    data: Its examples.
  """
  return Loader(
    data.train,
    batch_size=spec.train.batch_size,
    max_length=spec.data.max_length,
    pack=spec.data.pack,
    seed=spec.seed,
  )


def _compare(spec: RunSpec, base: Base, data: Prepared) -> None:
  """Requires that all processes train the same."""
  processes.require_same('config', spec.to_json())
  sizes = [path.stat().st_size for path in base.model.paths]
  processes.require_same('base', f'{base.config} {sizes}')
  processes.require_same('data', digest((*data.train, *data.eval)))


def _held_out(spec: RunSpec, data: Prepared) -> list[Batch]:
  return eval_batches(
    data.eval,
    batch_size=spec.train.batch_size,
    max_length=spec.data.max_length,
    pack=spec.data.pack,
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


def _count_steps(spec: RunSpec, loader: Loader) -> int:
  if spec.train.steps is not None:
    return spec.train.steps
  return loader.steps_in(spec.train.epochs)
