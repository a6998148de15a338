"""One rule a primitive: what it does to a lazy leaf.

A rule takes the evaluator, the equation and its operands, and returns the
results, or None where it does not cover the case: the leaf is then formed in
full and reported.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jlora.core.lora import LazyArray, apply_kernel


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('leaf',), meta_fields=('path',)
)
@dataclasses.dataclass(frozen=True)
class Lazy:
  """A lazy leaf on its way through a program.

  Attributes:
    leaf: A QuantizedArray or a LoraArray.
    path: Where it stood in the arguments, for reports.
  """

  leaf: LazyArray
  path: str


def _dot_general(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Sequence[Any] | None:
  """Contracting all input axes of an unstacked kernel is the fused op."""
  contracted, batch = equation.params['dimension_numbers']
  right = isinstance(operands[1], Lazy)
  x, kernel = operands if right else reversed(operands)
  if batch != ((), ()) or isinstance(x, Lazy) or kernel.leaf.stacked:
    return None
  of_x, of_kernel = contracted if right else reversed(contracted)
  order = np.argsort(of_kernel)
  if [of_kernel[i] for i in order] != list(range(len(kernel.leaf.inputs))):
    return None
  y = _contract(x, [of_x[i] for i in order], kernel.leaf, equation.params)
  if not right:  # lhs axes come first in the result
    outputs = len(kernel.leaf.outputs)
    y = jax.numpy.moveaxis(y, range(-outputs, 0), range(outputs))
  return [y]


def _contract(
  x: jax.Array, axes: list[int], leaf: LazyArray, params: dict[str, Any]
) -> jax.Array:
  """Returns [free axes of x, outputs] for a product over `axes` of `x`."""
  free = [i for i in range(x.ndim) if i not in axes]
  x = x.transpose(*free, *axes)
  kept = x.shape[: len(free)]
  rows = x.reshape(*kept, math.prod(leaf.inputs))
  y = apply_kernel(
    rows, leaf, params['preferred_element_type'], params['precision']
  )
  return y.reshape(*kept, *leaf.outputs)


def _convert_element_type(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Sequence[Any] | None:
  """A cast changes what the kernel is decoded to."""
  (kernel,) = operands
  dtype = equation.params['new_dtype']
  if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
    return None
  return [dataclasses.replace(kernel, leaf=kernel.leaf.astype(dtype))]


def _jit(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Sequence[Any]:
  """An inner jit is inlined: the caller's jit is the one that counts."""
  inner = equation.params['jaxpr']
  return evaluate(inner.jaxpr, inner.consts, operands)


def _checkpoint(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Sequence[Any]:
  """Rematerialized code stays so, around its evaluation."""
  params = equation.params

  def run(*inner: Any) -> list[jax.Array]:
    return evaluate(params['jaxpr'], (), inner)

  return jax.checkpoint(
    run, prevent_cse=params['prevent_cse'], policy=params['policy']
  )(*operands)


def _scan(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Sequence[Any]:
  """A scan slices the stacked axes of every field of a lazy leaf."""
  params = equation.params
  first = params['num_consts']
  last = first + params['num_carry']
  consts = operands[:first]
  carry = [evaluate.dense(x, 'a loop carry') for x in operands[first:last]]
  xs = [
    evaluate.dense(x, 'scan over an axis that is not stacked')
    if isinstance(x, Lazy) and not x.leaf.stacked
    else x
    for x in operands[last:]
  ]
  inner = params['jaxpr']

  def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
    outputs = evaluate(inner.jaxpr, inner.consts, [*consts, *carry, *xs])
    return outputs[: len(carry)], outputs[len(carry) :]

  carry, ys = jax.lax.scan(
    body,
    carry,
    xs,
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carry, *ys]


RULES = {
  'checkpoint': _checkpoint,
  'convert_element_type': _convert_element_type,
  'dot_general': _dot_general,
  'jit': _jit,
  'pjit': _jit,
  'remat2': _checkpoint,
  'scan': _scan,
}
