"""Both halves of a run's parameters, read, split and placed on its devices."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jlora.checkpoints import placement
from jlora.checkpoints.bases import Base
from jlora.checkpoints.starts import Starts
from jlora.core.combination import combine
from jlora.core.decompositions import Start
from jlora.core.partition import partition
from jlora.core.plan import Placeholder, is_frozen_leaf
from jlora.core.state import TrainState
from jlora.core.tree import arrays_by_path, matching, nest
from jlora.inference.plain import count_plain
from jlora.models import families, layout
from jlora.models.config import DecoderConfig
from jlora.parallel.shardings import Shardings, make_shardings
from jlora.training.optimizers import make_optimizer
from jlora.training.run_spec import RunSpec


class Halves(NamedTuple):
  """What a run starts from.

  Attributes:
    frozen: The frozen half of the parameters.
    state: The state before the first step.
    tx: The optimizer.
    starts: How adapters started that are a part of the base, by path.
    shardings: Where the parameters lie.
    dtype: What the base computes in.
  """

  frozen: Any
  state: TrainState
  tx: optax.GradientTransformation
  starts: dict[str, Start]
  shardings: Shardings
  dtype: Any


def abstract_halves(
  spec: RunSpec, config: DecoderConfig, dtype: Any, mesh: Mesh, steps: int
) -> Halves:
  """Returns what `load_halves` will, as shapes: no base is read.

  Args:
    spec: The run, resolved for its base.
    config: The base's sizes.
    dtype: What the base computes in.
    mesh: The devices; they need not be here.
    steps: Updates of the whole run.

  Raises:
    ConfigError: The specs do not fit the base.
  """
  params = nest(layout.shapes(config, dtype))
  frozen, trainable = partition(
    jax.random.key(0), params, spec.lora, quant=spec.quant
  )
  frozen = jax.tree.map(_whole_in_float32, frozen, is_leaf=is_frozen_leaf)
  shardings = shardings_of(spec, frozen, mesh)
  tx = make_optimizer(spec.optim, steps, trainable)
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32),
    trainable,
    jax.eval_shape(tx.init, trainable),
  )
  state = _put(state, shardings.state(state))
  frozen = _put(frozen, shardings.frozen(frozen))
  return Halves(frozen, state, tx, {}, shardings, dtype)


def _whole_in_float32(leaf: Any) -> Any:
  """Returns a leaf as `load_split` has it: what is trained whole stays so."""
  if not isinstance(leaf, Placeholder):
    return leaf
  return dataclasses.replace(leaf, dtype=jnp.dtype(jnp.float32))


def load_halves(
  spec: RunSpec, base: Base, shapes: Halves, starts: Starts | None
) -> Halves:
  """Reads a base, and makes the state before the first step.

  Args:
    spec: The run, resolved for its base.
    base: The base.
    shapes: From `abstract_halves`.
    starts: Of the run that is continued or evaluated; None finds them.

  Raises:
    JloraError: The base is damaged.
  """
  frozen, trainable, starts = placement.load_split(
    jax.random.key(spec.seed),
    base,
    spec.lora,
    spec.quant,
    shapes.dtype,
    starts=starts,
    shardings=shapes.shardings,
  )

  def first(trainable: Any) -> TrainState:
    return TrainState(jnp.int32(0), trainable, shapes.tx.init(trainable))

  placed = shapes.shardings.state(shapes.state)
  make = jax.jit(first, out_shardings=placed, donate_argnums=0)
  return shapes._replace(frozen=frozen, state=make(trainable), starts=starts)


def count_merged(spec: RunSpec, halves: Halves) -> int:
  """Returns the bytes of a device that merged weights take with `eval.merge`.

  Args:
    spec: The run, resolved for its base.
    halves: Its parameters, as arrays or as shapes.
  """
  params = jax.eval_shape(
    lambda *parts: combine(*parts, spec.lora),
    halves.frozen,
    halves.state.trainable,
  )
  return count_plain(params, halves.dtype, halves.shardings.of_plain)


def shardings_of(spec: RunSpec, frozen: Any, mesh: Mesh) -> Shardings:
  """Returns where the parameters of a run lie.

  Args:
    spec: The run.
    frozen: The frozen half, as arrays or as shapes.
    mesh: The devices.

  Raises:
    ConfigError: A rule of the run's own matches nothing, or does not fit.
  """
  leaves = arrays_by_path(frozen, is_frozen_leaf)
  own = spec.mesh.rules
  matching((pattern for pattern, _ in own), leaves)  # each one, or it refuses
  return make_shardings(
    leaves, (*own, *families.SHARDING), mesh, offload=spec.optim.offload
  )


def _put(tree: Any, shardings: Any) -> Any:
  """Returns the shapes of a tree with the shardings of one like it."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )
