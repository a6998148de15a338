"""Both halves of a run's parameters, read, split and placed on its devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jlora.checkpoints import placement
from jlora.checkpoints.bases import Base
from jlora.checkpoints.starts import Starts
from jlora.core.decompositions import Start
from jlora.core.partition import partition
from jlora.core.plan import is_frozen_leaf
from jlora.core.state import TrainState
from jlora.core.tree import arrays_by_path, matching, nest
from jlora.models import families
from jlora.parallel.devices import compute_dtype
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


def load_halves(
  spec: RunSpec, base: Base, mesh: Mesh, steps: int, starts: Starts | None
) -> Halves:
  """Reads a base leaf by leaf, and makes the state before the first step.

  Args:
    spec: The run, resolved for its base.
    base: The base.
    mesh: The devices.
    steps: Updates of the whole run.
    starts: Of the run that is continued or evaluated; None finds them.

  Raises:
    JloraError: The specs do not fit the base, or it is damaged.
  """
  dtype = compute_dtype(spec.train.dtype)
  shapes = nest(families.shapes(base.config))
  abstract, _ = partition(
    jax.random.key(0), shapes, spec.lora, quant=spec.quant
  )
  shardings = shardings_of(spec, abstract, mesh)
  frozen, trainable, starts = placement.load_halves(
    jax.random.key(spec.seed),
    base,
    spec.lora,
    spec.quant,
    dtype,
    starts=starts,
    shardings=shardings,
  )
  tx = make_optimizer(spec.optim, steps, trainable)

  def first(trainable: Any) -> TrainState:
    return TrainState(jnp.int32(0), trainable, tx.init(trainable))

  placed = shardings.state(jax.eval_shape(first, trainable))
  make = jax.jit(first, out_shardings=placed, donate_argnums=0)
  state = make(trainable)
  return Halves(frozen, state, tx, starts, shardings, dtype)


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
