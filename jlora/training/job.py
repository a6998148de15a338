"""Everything a run needs, built once and checked before the first step."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console

from jlora.checkpoints.bases import Base, open_base
from jlora.checkpoints.starts import Starts, to_bytes
from jlora.core.decompositions import Start
from jlora.core.description import Description, describe
from jlora.core.lift import lift
from jlora.core.state import TrainState
from jlora.data.batch import Batch
from jlora.data.fingerprints import with_sources
from jlora.data.loader import Loader, digest, eval_batches
from jlora.data.prepare import Prepared, prepare
from jlora.data.recipe import Recipe
from jlora.data.report import show_examples
from jlora.data.stream_loader import StreamLoader
from jlora.data.streaming import prepare_stream
from jlora.errors import DataError
from jlora.models import layout
from jlora.models.decoder import Decoder
from jlora.parallel import processes
from jlora.parallel.devices import compute_dtype
from jlora.parallel.mesh import by_example, make_mesh
from jlora.parallel.shardings import Shardings
from jlora.training.flops import Work, work_of
from jlora.training.footprint import Footprint, measure
from jlora.training.halves import abstract_halves, count_merged, load_halves
from jlora.training.optimizers import learning_rates
from jlora.training.program import abstract_batch, make_program
from jlora.training.requirements import (
  as_stored,
  check_rows,
  require_one_run,
  resolve,
)
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
    rates: Learning rates [steps].
    description: What is trained, quantized and frozen.
    shardings: Where the parameters lie.
    footprint: Parameters and bytes.
    work: Operations of an update.
  """

  spec: RunSpec
  base: Base
  data: Prepared
  digest: str
  loader: Loader | StreamLoader
  held_out: list[Batch]
  steps: int
  frozen: Any
  state: TrainState
  starts: dict[str, Start]
  step: Callable[..., Any]
  evaluate: Callable[..., Any]
  apply: Callable[..., Any]
  dtype: Any
  rates: np.ndarray
  description: Description
  shardings: Shardings
  footprint: Footprint
  work: Work

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
  """Loads the data, compiles the step, and reads and splits the base.

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
  spec = as_stored(resolve(spec, base.config), base)
  if base.codes:
    console.print(base.codes.describe(spec.quant), highlight=False)
  data = load_data(spec, base)
  show_examples(data.train, base.tokenizer, data.report, console)
  loader = make_loader(spec, data)
  steps = _count_steps(spec, loader)

  fingerprint = digest((*data.train, *data.eval))
  if spec.data.stream:
    names = [name for name, _ in spec.data.sources]
    fingerprint = with_sources(fingerprint, names)
  require_one_run(spec, base, fingerprint)

  dtype = compute_dtype(spec.train.dtype)
  halves = abstract_halves(spec, base.config, dtype, mesh, steps)
  program = make_program(spec, base.config, halves, mesh)
  batch = abstract_batch(spec, mesh)
  traced = program.step.trace(halves.state, halves.frozen, batch)
  compiled = traced.lower().compile()
  if spec.eval.merge:
    console.print(_merged(count_merged(spec, halves)))
  if spec.lora.changes_base and not starts:
    console.print(f'starting the adapters from the base: {spec.lora.init}')
  halves = load_halves(spec, base, halves, starts)
  if halves.starts and processes.are_several():
    found = hashlib.sha256(to_bytes(halves.starts)).hexdigest()
    processes.require_same('start of the adapters', found)
  shapes = layout.shapes(base.config, dtype)
  description = describe(shapes, spec.lora, quant=spec.quant)
  return Job(
    spec=spec,
    base=base,
    data=data,
    digest=fingerprint,
    loader=loader,
    held_out=_held_out(spec, data),
    steps=steps,
    frozen=halves.frozen,
    state=halves.state,
    starts=halves.starts,
    step=compiled,
    evaluate=program.evaluate,
    apply=lift(
      Decoder(base.config, dtype=dtype).apply, gather=halves.shardings.gather
    ),
    dtype=dtype,
    rates=learning_rates(spec.optim, steps),
    description=description,
    shardings=halves.shardings,
    footprint=measure(
      halves.frozen, halves.state, compiled, trained=description.parameters
    ),
    work=work_of(base.config, halves, traced.jaxpr, batch.tokens.shape),
  )


def _merged(size: int) -> str:
  return (
    f'eval.merge: answers take {size / 1e6:,.1f} MB of merged weights on each'
    ' device, beside what a step keeps'
  )


def load_data(spec: RunSpec, base: Base) -> Prepared:
  """Returns the examples of a run, tokenized for its base.

  Args:
    spec: The run.
    base: Its base.

  Raises:
    DataError: A source is missing, malformed or too small.
  """
  data = spec.data
  recipe = Recipe(
    tokenizer=base.tokenizer,
    max_length=data.max_length,
    learn=data.learn,
    thinking=data.thinking,
    template=data.template,
    too_long=data.too_long,
    vocab_size=base.config.vocab_size,
  )
  options = {
    'pack': data.pack,
    'seed': spec.seed,
    'train_examples': data.train_examples,
    'eval_examples': data.eval_examples,
    'columns': data.columns,
  }
  if not data.stream:
    return prepare(data.train, data.eval, recipe, **options)
  return prepare_stream(
    data.sources,
    data.eval,
    recipe,
    batch_size=spec.train.batch_size,
    buffer=data.shuffle_buffer,
    **options,
  )


def make_loader(spec: RunSpec, data: Prepared) -> Loader | StreamLoader:
  """Returns the batches of a run by step.

  Args:
    spec: The run.
    data: Its examples.
  """
  if isinstance(data.order, StreamLoader):
    return data.order
  return Loader(
    data.train,
    batch_size=spec.train.batch_size,
    max_length=spec.data.max_length,
    pack=spec.data.pack,
    seed=spec.seed,
    mixture=data.order,
  )


def _held_out(spec: RunSpec, data: Prepared) -> list[Batch]:
  return eval_batches(
    data.eval,
    batch_size=spec.train.batch_size,
    max_length=spec.data.max_length,
    pack=spec.data.pack,
  )


def _count_steps(spec: RunSpec, loader: Loader) -> int:
  if spec.train.steps is not None:
    return spec.train.steps
  return loader.steps_in(spec.train.epochs)
