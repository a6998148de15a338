"""Runs unchanged code on lazy leaves.

`lift` traces a function on plain abstract arrays, so the function never sees a
lazy leaf, and then evaluates the traced program with a rule (`rules.py`)
wherever a lazy leaf flows. Every other equation is bound unchanged.
"""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib
from jax.extend import core as jex

from jlora.core import shard_map
from jlora.core.control import CONTROL
from jlora.core.flow import Flow, make_flow
from jlora.core.lazy import LazyArray, is_lazy
from jlora.core.linear import Adapter, Kernel
from jlora.core.rules import LEAF_RULES
from jlora.core.tracing import trace

Part = Kernel | Adapter
Gather = Callable[[str, Part], Part]

RULES = {
  **LEAF_RULES,
  **CONTROL,
  'pvary': shard_map.pvary,
  'shard_map': shard_map.shard_map,
}


def lift(
  fn: Callable[..., Any],
  *,
  on_missing: str = 'warn',
  gather: Gather | None = None,
) -> Callable[..., Any]:
  """Returns `fn` with the same signature, for parameters with lazy leaves.

  Array leaves of the arguments are traced; everything else (flags, functions,
  Python numbers) is passed as it is. Products with a lazy kernel run through
  one fused op that never forms the kernel's gradient. Derivatives exist in
  reverse mode.

  Args:
    fn: A function of trees of arrays, such as the `apply` of a Linen module.
    on_missing: What happens to a lazy leaf that meets an operation without a
      rule: 'warn' forms the plain array and warns once, with path and
      operation; 'error' raises.
    gather: Called with the path of a lazy leaf and a part of one layer of it,
      before that part is used; returns the same, moved. A part is the frozen
      kernel, each time in the forward pass and in the backward pass, as a
      `QuantizedArray` before it is decoded or a plain matrix [in, out], or the
      `Adapter`, which is differentiated through it. With a sharding constraint
      in it, codes move between devices where XLA alone would move decoded
      kernels or activations. The path starts with the argument's position or
      name: `0/params/layers/mlp/up_proj/kernel`.

  Returns:
    The lifted function. Its results are plain arrays.

  Raises:
    ValueError: `on_missing` is another word.
    TypeError: When called, with `on_missing='error'`, on an operation without
      a rule.

  Example:
    >>> apply = jlora.lift(model.apply)
    >>> logits = apply({'params': combine(frozen, trainable, spec)}, tokens)
  """
  if on_missing not in ('warn', 'error'):
    raise ValueError(f"on_missing is {on_missing!r}; use 'warn' or 'error'")

  @functools.wraps(fn)
  def lifted(*args: Any, **kwargs: Any) -> Any:
    if not any(map(is_lazy, jax.tree.leaves((args, kwargs), is_leaf=is_lazy))):
      with _CombineHint():
        return fn(*args, **kwargs)
    program = trace(fn, args, kwargs)
    inputs = [
      make_flow(_gathered(leaf, path, gather), path) if is_lazy(leaf) else leaf
      for leaf, path in zip(program.inputs, program.paths, strict=True)
    ]
    evaluate = Evaluator(on_missing)
    outputs = evaluate(program.closed.jaxpr, program.closed.consts, inputs)
    return jax.tree.unflatten(
      program.results, list(map(evaluate.dense, outputs))
    )

  return lifted


@dataclasses.dataclass(frozen=True)
class _GatherAt:
  """A gather with its path."""

  gather: Gather
  path: str

  def __call__(self, part: Part) -> Part:
    return self.gather(self.path, part)


def _gathered(leaf: LazyArray, path: str, gather: Gather | None) -> LazyArray:
  """Returns a lazy leaf whose parts are gathered before they are used."""
  if gather is None:
    return leaf
  return dataclasses.replace(leaf, gather=_GatherAt(gather, path))


class _CombineHint:
  """Notes, on any error, what may be missing where no leaf is lazy."""

  def __enter__(self) -> None:
    """Does nothing."""

  def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
    """Adds the note and lets the error through."""
    if error is not None:
      error.add_note(
        'The lifted function was given no lazy leaf. If these are the halves of'
        ' the parameters, put them together first:'
        ' jlora.combine(frozen, trainable, spec).'
      )


class Evaluator:
  """Evaluates a traced program, with a rule wherever a lazy leaf flows.

  Attributes:
    on_missing: As in `lift`.
  """

  def __init__(self, on_missing: str):
    self.on_missing = on_missing
    self._reported: set[tuple[str, str]] = set()

  def __call__(
    self, jaxpr: jex.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]
  ) -> list[Any]:
    """Returns the outputs of `jaxpr`, which may be lazy.

    Args:
      jaxpr: The program.
      consts: Values of its constants.
      inputs: Arrays or `Flow`s, one for each input.
    """
    values: dict[jex.Var, Any] = {}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
      return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
      operands = [read(atom) for atom in equation.invars]
      results = self._evaluate(equation, operands)
      values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _evaluate(
    self, equation: jex.JaxprEqn, operands: list[Any]
  ) -> Sequence[Any]:
    if any(isinstance(x, Flow) for x in operands):
      rule = RULES.get(equation.primitive.name)
      results = rule(self, equation, operands) if rule else None
      if results is not None:
        return results
      operands = [self.dense(x, equation) for x in operands]
    return bind(equation, operands)

  def dense(
    self,
    value: Any,
    equation: jex.JaxprEqn | None = None,
    operation: str | None = None,
  ) -> Any:
    """Returns a plain array, and reports a lazy leaf that had to become one.

    Args:
      value: Anything; only a `Flow` is changed.
      equation: What needs the plain array; None is the caller of the function.
      operation: What the report calls it; None is the name of its primitive.
    """
    if not isinstance(value, Flow):
      return value
    if operation is None:
      operation = equation.primitive.name if equation else 'being returned'
    message = (
      f'{operation!r}{_source(equation)} has no rule for the lazy leaf'
      f' {value.path!r} of shape {value.leaf.shape}: the kernel is formed in'
      ' full, and its gradient with it'
    )
    if self.on_missing == 'error':
      raise TypeError(message)
    if (value.path, operation) not in self._reported:
      self._reported.add((value.path, operation))
      warnings.warn(message, stacklevel=2)
    return value.dense()


def _source(equation: jex.JaxprEqn | None) -> str:
  """Returns where in the traced code an equation comes from, if known."""
  info = getattr(equation, 'source_info', None)
  frames = getattr(getattr(info, 'traceback', None), 'frames', ())
  for frame in frames:
    if not frame.file_name.startswith(_INTERNAL):
      return f' in {frame.file_name}:{frame.line_num} ({frame.function_name})'
  return ''


# Folders whose lines say nothing about the code that was lifted.
_INTERNAL = (
  *(str(pathlib.Path(m.__file__).parent) for m in (jax, jaxlib)),
  str(pathlib.Path(__file__).parent),
)


def bind(equation: jex.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
  """Evaluates one equation on plain arrays, unchanged."""
  primitive = equation.primitive
  results = primitive.bind(
    *operands, **primitive.get_bind_params(equation.params)
  )
  return results if primitive.multiple_results else [results]
