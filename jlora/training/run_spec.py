"""Everything that defines a run, resolved and checked."""

import dataclasses
import json
import math
from typing import Any

from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec
from jlora.core.targets import as_pairs
from jlora.errors import ConfigError
from jlora.parallel.rules import Names, Rules
from jlora.training.checks import choose, require
from jlora.training.data_spec import DataSpec
from jlora.training.optimizers import OptimSpec

REMAT = ('none', 'dots', 'full')
ATTENTION = ('auto', 'blockwise')
DTYPES = ('auto', 'float32', 'bfloat16')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
  """How long, in which pieces and in which precision a run trains.

  Attributes:
    batch_size: Rows an update, over all devices.
    accumulate: Microbatches that an update is cut into.
    steps: Updates; None where `epochs` says it.
    epochs: Passes over the data; None where `steps` says it.
    remat: What is kept for the backward pass: 'none' everything, 'dots' the
      results of linear layers and of attention, 'full' a layer's input.
    attention: 'blockwise' everywhere, or 'auto': on GPUs and TPUs by the kernel
      that fits; see `jlora.models.kernels`.
    dtype: What the base computes in; 'auto' is float32 on CPU, else bfloat16.
    checkpoint_every: Steps between checkpoints.
    loss_chunk: Tokens whose logits exist at once.
    max_skipped: Updates in a row that may be skipped as not finite.
  """

  batch_size: int = 4
  accumulate: int = 1
  steps: int | None = None
  epochs: float | None = None
  remat: str = 'full'
  attention: str = 'auto'
  dtype: str = 'auto'
  checkpoint_every: int = 20
  loss_chunk: int = 256
  max_skipped: int = 10

  def __post_init__(self) -> None:
    """Checks the fields."""
    require(
      'train',
      self,
      'batch_size',
      'accumulate',
      'checkpoint_every',
      'loss_chunk',
      'max_skipped',
    )
    if self.batch_size % self.accumulate:
      raise ConfigError(
        f'train.batch_size {self.batch_size} cannot be cut into'
        f' train.accumulate={self.accumulate} equal microbatches'
      )
    if (self.steps is None) == (self.epochs is None):
      raise ConfigError(
        f'train.steps is {self.steps} and train.epochs is {self.epochs}; give'
        ' exactly one of them'
      )
    length = self.steps if self.epochs is None else self.epochs
    if not 0 < length < float('inf'):
      raise ConfigError(
        f'train.steps or epochs is {length}; it must be above 0 and finite'
      )
    choose('train', self, remat=REMAT, dtype=DTYPES, attention=ATTENTION)

  def rows(self, devices: int) -> int:
    """Returns the rows of a microbatch on each device.

    Args:
      devices: How many share the rows.
    """
    return self.batch_size // self.accumulate // devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSpec:
  """What is measured on held-out data.

  Attributes:
    every: Steps between evaluations of the held-out loss.
    examples: Held-out examples that are answered and scored, before and after.
    max_new_tokens: Longest answer.
    batch_size: Answers generated at once.
    samples: Answers shown in samples.md.
    merge: Whether adapter and base are merged into plain arrays while prompts
      are answered, instead of being decoded for each token: faster, for the
      memory of dense weights beside all that the run holds.
  """

  every: int = 20
  examples: int = 200
  max_new_tokens: int = 32
  batch_size: int = 16
  samples: int = 8
  merge: bool = False

  def __post_init__(self) -> None:
    """Checks the fields."""
    require('eval', self, 'every', 'max_new_tokens', 'batch_size')
    require('eval', self, 'examples', 'samples', least=0)


def _mesh_axes(names: Any) -> Names:
  """Returns the mesh axes of one rule as nested tuples."""
  if not isinstance(names, list | tuple):
    raise ConfigError(
      f'mesh.rules gives {names!r} for a leaf; it takes one entry for each of'
      " its axes, such as (None, 'fsdp', 'tensor')"
    )
  found = tuple(tuple(n) if isinstance(n, list) else n for n in names)
  axes = [
    axis
    for entry in found
    if entry is not None
    for axis in (entry if isinstance(entry, tuple) else (entry,))
  ]
  are_names = all(isinstance(axis, str) for axis in axes)
  if not are_names or len(set(axes)) < len(axes):
    raise ConfigError(
      f'mesh.rules gives {names!r} for a leaf; each entry is a mesh axis, some'
      ' of them or None, and no mesh axis comes twice'
    )
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
  """How devices are laid out; -1 is what the other axes leave.

  Attributes:
    data: Devices that share the rows of a batch, each with all parameters.
    fsdp: Devices that share the rows and the parameters; a layer's 4-bit codes
      are brought together where it is computed.
    tensor: Devices that share each layer's products.
    rules: Ahead of the family's own: pairs of a pattern over leaf paths, and
      for each axis of the leaf the mesh axis, or axes, that cut it, or None.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  rules: Rules = ()

  def __post_init__(self) -> None:
    """Turns lists and dicts into tuples."""
    pairs = as_pairs(self.rules, 'mesh.rules')
    rules = tuple((pattern, _mesh_axes(names)) for pattern, names in pairs)
    object.__setattr__(self, 'rules', rules)

  def fits(self, devices: int) -> bool:
    """Whether so many devices can be laid out like this."""
    known = math.prod(n for n in self.sizes if n != -1)
    return devices % known == 0 if -1 in self.sizes else devices == known

  @property
  def sizes(self) -> tuple[int, int, int]:
    """Devices along each axis."""
    return self.data, self.fsdp, self.tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSpec:
  """What is written while training; `every` is the steps between lines."""

  every: int = 1

  def __post_init__(self) -> None:
    """Checks the fields."""
    require('log', self, 'every')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
  """A whole run, one attribute a config section."""

  base: str
  quant: QuantSpec | None
  lora: LoraSpec
  data: DataSpec
  train: TrainSpec
  optim: OptimSpec
  eval: EvalSpec
  mesh: MeshSpec
  log: LogSpec
  seed: int = 0

  def __post_init__(self) -> None:
    """Checks the seed, and what one section needs of another."""
    if not 0 <= self.seed < 1 << 32:
      raise ConfigError(f'seed is {self.seed}; it must be in [0, 2^32)')

    if self.data.stream:
      self._check_stream()
    if self.lora.init == 'loftq' and self.quant is None:
      raise ConfigError(
        "lora.init 'loftq' starts from the error of quantization, and quant is"
        " None; start from experiments/qlora.py, or use 'pissa'"
      )

  def _check_stream(self) -> None:
    if self.train.steps is None:
      raise ConfigError(
        f'train.epochs is {self.train.epochs}, but with data.stream nobody'
        ' knows how long the data is; set train.steps'
      )
    if self.data.shuffle_buffer < self.train.batch_size:
      raise ConfigError(
        f'data.shuffle_buffer is {self.data.shuffle_buffer}, fewer examples'
        f' than the {self.train.batch_size} rows of train.batch_size; raise it'
      )

  @property
  def is_adapter(self) -> bool:
    """Whether the run trains adapters, as opposed to whole leaves only."""
    return bool(self.lora.targets)

  def to_json(self) -> str:
    """Returns the run as JSON with sorted keys; `config.from_json` reads it."""
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + '\n'
