"""Runs unchanged code on lazy leaves.

`lift` traces a function on plain abstract arrays, so the function never sees a
lazy leaf, and then evaluates the traced program with a rule (`rules.py`)
wherever a lazy leaf flows. Every other equation is bound unchanged.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jlora.core import rules, tree
from jlora.core.lora import densify, is_lazy
from jlora.core.rules import Lazy


def lift(
  fn: Callable[..., Any], *, on_missing: str = 'warn'
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
    entries, treedef = jax.tree_util.tree_flatten_with_path(
      (args, kwargs), is_leaf=is_lazy
    )
    leaves = [leaf for _, leaf in entries]
    if not any(map(is_lazy, leaves)):
      return fn(*args, **kwargs)
    traced = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def flat(*arrays: jax.Array) -> Any:
      filled = list(leaves)
      for i, array in zip(traced, arrays, strict=True):
        filled[i] = array
      inner_args, inner_kwargs = jax.tree.unflatten(treedef, filled)
      return fn(*inner_args, **inner_kwargs)

    abstract = [_abstract(leaves[i]) for i in traced]
    program, shapes = jax.make_jaxpr(flat, return_shape=True)(*abstract)
    inputs = [
      Lazy(leaves[i], tree.join(entries[i][0][1:]))
      if is_lazy(leaves[i])
      else leaves[i]
      for i in traced
    ]
    outputs = Evaluator(on_missing)(program.jaxpr, program.consts, inputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

  return lifted


def _is_array(leaf: Any) -> bool:
  return is_lazy(leaf) or isinstance(leaf, jax.Array | np.ndarray)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  weak = getattr(leaf, 'weak_type', False)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)


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
  ) -> list[jax.Array]:
    """Returns the outputs of `jaxpr` as plain arrays.

    Args:
      jaxpr: The program.
      consts: Values of its constants.
      inputs: Arrays or `Lazy` leaves, one for each input.
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
    return [self.dense(read(atom), 'being returned') for atom in jaxpr.outvars]

  def _evaluate(
    self, equation: jex.JaxprEqn, operands: list[Any]
  ) -> Sequence[Any]:
    name = equation.primitive.name
    if any(isinstance(x, Lazy) for x in operands):
      rule = rules.RULES.get(name)
      results = rule(self, equation, operands) if rule else None
      if results is not None:
        return results
      operands = [self.dense(x, name) for x in operands]
    return bind(equation, operands)

  def dense(self, value: Any, operation: str) -> Any:
    """Returns a plain array, and reports a lazy leaf that had to become one.

    Args:
      value: Anything; only a `Lazy` is changed.
      operation: What needs the plain array, for the report.
    """
    if not isinstance(value, Lazy):
      return value
    message = (
      f'{operation!r} has no rule for the lazy leaf {value.path!r} of shape'
      f' {value.leaf.shape}: the kernel is formed in full, and its gradient'
      ' with it'
    )
    if self.on_missing == 'error':
      raise TypeError(message)
    if (value.path, operation) not in self._reported:
      self._reported.add((value.path, operation))
      warnings.warn(message, stacklevel=2)
    return densify(value.leaf)


def bind(equation: jex.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
  """Evaluates one equation on plain arrays, unchanged."""
  primitive = equation.primitive
  results = primitive.bind(
    *operands, **primitive.get_bind_params(equation.params)
  )
  return results if primitive.multiple_results else [results]
