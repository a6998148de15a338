"""What all training arms share: their work, batches, and how steps are timed.

To add an arm: write `arms/NAME.py` with a function `run(work)` that reads
`Work(**work)`, makes a step out of `work.folder` (a Hugging Face folder in
float32), and returns `timed(…)` of it with any further figures in a flat dict;
end it with `worker.serve(run)`. Then name it in `train_step.ARMS`.

JAX and jlora are imported inside functions: peers' processes come here too.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.benchmarks.harness import conversations, worker

Fields = dict[str, np.ndarray]  # of a batch
LEARNING_RATE = 2e-4
TOKENS = 'tokens.npy'
COUNT = 1_000_003  # tokens there are; a prime, so that batches differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What a training arm is asked for.

  Attributes:
    method: 'lora', or 'qlora' for kernels in NF4.
    remat: What is kept for the backward pass: 'none' everything, 'dots' the
      results of linear layers, 'full' a layer's input.
    batch: Rows a step.
    length: Tokens a row.
    rank: Of the adapters of all linear layers.
    alpha: Their scale is alpha / rank.
    steps: Steps that are timed, after one that is not.
    folder: Of the weights and of tokens.
    data: '' for random tokens, from `write_tokens`; 'packed' or 'padded' for
      conversations, from `conversations.write`.
    threads: Processors of the process.
    began: When it was started.
  """

  method: str
  remat: str
  batch: int
  length: int
  rank: int
  alpha: float
  steps: int
  folder: str
  data: str = ''
  threads: int = 0
  began: float = 0.0

  @property
  def quantized(self) -> bool:
    """Whether the kernels are in NF4."""
    return self.method == 'qlora'

  @property
  def path(self) -> pathlib.Path:
    """The folder of the weights."""
    return pathlib.Path(self.folder)

  def batches(self) -> list[Fields]:
    """Returns what each step reads, the first one's too.

    Those of random tokens have the fields tokens, targets and loss_mask; those
    of conversations all fields of `jlora.data.batch.Batch`.
    """
    if self.data:
      return conversations.read(self.path, self.data)
    tokens = np.load(self.path / TOKENS)
    shape = (self.steps + 1, self.batch, self.length)
    return [with_targets(part) for part in np.resize(tokens, shape)]

  def timed(
    self, step: Callable[[int], float], batches: list[Fields]
  ) -> dict[str, Any]:
    """Times steps, see `worker.timed`.

    Args:
      step: Runs the step of a number, waits for it, and returns its loss.
      batches: What they read; places without a token do not count.
    """
    found = worker.timed(step, [places(x) for x in batches], self.began)
    return {'remat': self.remat, 'loss': found['losses'][0], **found}

  def run(
    self, step: Any, trainable: Any, state: Any, frozen: Any
  ) -> dict[str, Any]:
    """Compiles and times a step in JAX.

    Args:
      step: From `jax.jit`: (trainable, state, frozen, batch) -> (trainable,
        state, loss). It may donate the first two.
      trainable: What is trained.
      state: Of the optimizer.
      frozen: What is not trained.

    Returns:
      All figures of an arm.
    """
    import jax

    batches = self.batches()
    shapes = shapes_of((trainable, state, frozen, batches[0]))
    compiled, figures = compile_step(step, *shapes)

    def advance(number: int) -> float:
      nonlocal trainable, state
      batch = jax.device_put(batches[number])
      trainable, state, loss = compiled(trainable, state, frozen, batch)
      jax.block_until_ready(trainable)
      return float(loss)

    figures |= self.timed(advance, batches)
    figures['peak_bytes'] = worker.peak_bytes()
    return {**figures, **count_flops(step, *shapes)}


def with_targets(tokens: np.ndarray) -> Fields:
  """Returns a batch that learns the next token at all places but the last.

  Args:
    tokens: int32 [batch, length].
  """
  mask = np.ones(tokens.shape, np.float32)
  mask[:, -1] = 0
  return {
    'tokens': tokens,
    'targets': np.roll(tokens, -1, axis=1),
    'loss_mask': mask,
  }


def places(batch: Fields) -> int:
  """Returns how many places of a batch hold a token.

  Args:
    batch: Fields of it.
  """
  ids = batch.get('segment_ids')
  return batch['tokens'].size if ids is None else int((ids > 0).sum())


def write_tokens(folder: pathlib.Path, vocab: int) -> None:
  """Writes random tokens into one file, from which all arms cut batches.

  Args:
    folder: Of the weights.
    vocab: They are below it.
  """
  random = np.random.default_rng(0)
  np.save(folder / TOKENS, random.integers(0, vocab, COUNT, np.int32))


def compile_step(step: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
  """Traces and compiles a jitted step.

  Args:
    step: From `jax.jit`.
    *args: Arrays, or their shapes.

  Returns:
    The compiled step, and `compile_s`, `compiled_bytes`, the peak of one step
    as the compiler has it, and `temp_bytes`, its scratch.
  """
  from jlora.training.footprint import compiled_peak

  start = time.perf_counter()
  compiled = step.lower(*args).compile()
  seconds = time.perf_counter() - start
  return compiled, {
    'compile_s': seconds,
    'compiled_bytes': compiled_peak(compiled),
    'temp_bytes': compiled.memory_analysis().temp_size_in_bytes,
  }


def count_flops(step: Any, *args: Any) -> dict[str, Any]:
  """Returns `flops`: the operations of a step's matrix products.

  Args:
    step: From `jax.jit`.
    *args: Shapes of its arguments.
  """
  import jax

  from jlora.training import traced

  return {'flops': traced.count_flops(jax.make_jaxpr(step)(*args))}


def shapes_of(tree: Mapping[str, Any] | Any) -> Any:
  """Returns the shapes of a tree of arrays, which may then be donated."""
  import jax

  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
