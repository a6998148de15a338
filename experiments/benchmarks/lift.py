r"""What a lifted model costs, beside merging and beside LoRA written by hand.

  python -m experiments.benchmarks.lift

Prints floating-point operations of all matrix products and the scratch memory,
for the loss and its gradient with respect to the adapters, as a table. Nothing
is run but the compiler: a minute on two CPU cores. The README has the result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from experiments.benchmarks import linen_model, nnx_model, parts, plain_model
from jlora.training.traced import count_flops

MODELS = {
  'Linen': linen_model.make,
  'NNX': nnx_model.make,
  'plain JAX': plain_model.make,
}
SIZES = parts.Sizes()
WAYS = ('merged', 'lifted', 'by hand')


@dataclasses.dataclass(frozen=True)
class Step:
  """Loss and gradient of the adapters, and the shapes they are traced with.

  Attributes:
    run: Of `args`.
    args: What is trained, what is frozen, and the tokens.
  """

  run: Callable[..., Any]
  args: tuple[Any, ...]

  def flops(self) -> int:
    """Returns the floating-point operations of all matrix products."""
    return count_flops(jax.make_jaxpr(self.run)(*self.args))

  def compile(self) -> jax.stages.Compiled:
    """Returns the compiled step."""
    return jax.jit(self.run).lower(*self.args).compile()


def make_step(
  make: Callable[[parts.Sizes], parts.Model],
  way: str,
  *,
  quantized: bool,
  sizes: parts.Sizes = SIZES,
  rank: int = 8,
) -> Step:
  """Returns one training step without its optimizer.

  Args:
    make: Makes the model.
    way: One of `WAYS`.
    quantized: Whether the kernels are NF4 with double quantization.
    sizes: Of the model.
    rank: Of the adapters.
  """
  model = make(sizes)
  spec = jlora.LoraSpec(rank=rank, alpha=parts.SCALE * rank, axes=parts.AXES)
  quant = jlora.QuantSpec(axes=parts.AXES) if quantized else None
  frozen, trainable = jlora.partition(
    jax.random.key(0), model.params, spec, quant=quant
  )
  lifted = jlora.lift(model.apply, on_missing='error')

  def logits(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    if way == 'merged':
      return model.apply(jlora.merge(frozen, trainable, spec), tokens)
    if way == 'lifted':
      return lifted(jlora.combine(frozen, trainable, spec), tokens)
    return model.by_hand(parts.with_lora(frozen, trainable), tokens)

  def loss(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    return parts.cross_entropy(logits(trainable, frozen, tokens), tokens)

  tokens = jax.ShapeDtypeStruct((sizes.batch, sizes.length), jnp.int32)
  return Step(jax.value_and_grad(loss), (trainable, frozen, tokens))


def temp_of(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes of scratch memory."""
  return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
  """Prints the table."""
  columns = [f'{unit}, {way}' for unit in ('GFLOP', 'MB') for way in WAYS]
  print('| |', ' | '.join(columns), '|')
  print('| --- |', ' | '.join(['---:'] * len(columns)), '|')
  for name, make in MODELS.items():
    for quantized in (False, True):
      steps = [make_step(make, way, quantized=quantized) for way in WAYS]
      figures = [step.flops() / 1e9 for step in steps]
      figures += [temp_of(step.compile()) / 1e6 for step in steps]
      method = 'QLoRA' if quantized else 'LoRA'
      row = [f'{name}, {method}', *(f'{figure:.1f}' for figure in figures)]
      print('|', ' | '.join(row), '|', flush=True)


if __name__ == '__main__':
  main()
