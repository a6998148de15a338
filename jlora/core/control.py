"""Rules of primitives that hold programs: calls, branches and loops.

A lazy leaf goes into the inner program as it is. One that is only handed on,
from one turn of a loop to the next or to the results, stays lazy.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from jlora.core.flow import Flow, unstack
from jlora.core.views import View

Results = Sequence[Any] | None
HandedOn = Mapping[int, Flow]  # what a program returns unchanged, by position


def call(evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]) -> Results:
  """An inner jit is inlined: the caller's jit is the one that counts."""
  program, consts = _program(equation)
  return evaluate(program, consts, operands)


def _program(equation: jex.JaxprEqn) -> tuple[jex.Jaxpr, Sequence[Any]]:
  """Returns what a call runs, and the values of its constants."""
  inner = equation.params.get('jaxpr') or equation.params['call_jaxpr']
  return getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ())


def checkpoint(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """Rematerialized code stays so, around its evaluation."""
  params = equation.params
  program, consts = _program(equation)
  handed_on = _handed_on(_results(program), program.invars, operands)

  def run(*inner: Any) -> list[jax.Array]:
    found = evaluate(program, consts, inner)
    return _others(found, handed_on, evaluate, equation)

  remat = jax.checkpoint(
    run, prevent_cse=params['prevent_cse'], policy=params['policy']
  )
  return _put_back(handed_on, remat(*operands))


def cond(evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]) -> Results:
  """Every branch gets the lazy leaves."""
  index, *rest = operands

  def evaluated(branch: jex.ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    def run(*inner: Any) -> list[jax.Array]:
      found = evaluate(branch.jaxpr, branch.consts, inner)
      return _others(found, {}, evaluate, equation)

    return run

  branches = list(map(evaluated, equation.params['branches']))
  index = evaluate.dense(index, equation)
  return jax.lax.switch(index, branches, *rest)


def scan(evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]) -> Results:
  """A scan slices the stacked axes of every field of a lazy leaf."""
  params = equation.params
  first = params['num_consts']
  last = first + params['num_carry']
  program, consts = params['jaxpr'].jaxpr, params['jaxpr'].consts
  carry, results = operands[first:last], _results(program)
  fixed = _fixed(results[: len(carry)], program.invars[first:last], carry)
  loops = [_Loop(x, evaluate, equation) for x in operands[last:]]
  ys = _handed_on(results[len(carry) :], program.invars[last:], operands[last:])
  handed_on = {**fixed, **{len(carry) + i: y for i, y in ys.items()}}
  carry = _others(carry, fixed, evaluate, equation)

  def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
    turn = [loop.turn(x) for loop, x in zip(loops, xs, strict=True)]
    inputs = [*operands[:first], *_put_back(fixed, carry), *turn]
    found = evaluate(program, consts, inputs)
    results = _others(found, handed_on, evaluate, equation)
    return results[: len(carry)], results[len(carry) :]

  carry, ys = jax.lax.scan(
    body,
    carry,
    [loop.xs for loop in loops],
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return _put_back(handed_on, [*carry, *ys])


class _Loop:
  """What a scan loops over, and what one turn sees of it."""

  def __init__(self, x: Any, evaluate: Any, equation: jex.JaxprEqn):
    self._flow: Flow | None = None
    self.xs = x
    if not isinstance(x, Flow):
      return
    group = x.view.groups[0]
    if all(atom.axis is None for atom in group):  # every turn sees the same
      self._flow = Flow(x.leaf, x.path, View(x.view.groups[1:]))
      self.xs = None
    elif (found := unstack(x)) is not None:
      self.xs, view = found
      self._flow = Flow(x.leaf, x.path, view)
    else:
      self.xs = evaluate.dense(
        x, equation, 'scan over an axis that is not stacked'
      )

  def turn(self, x: Any) -> Any:
    """Returns what the program sees in one turn."""
    if self._flow is None:
      return x
    return self._flow if x is None else self._flow.with_leaf(x)


def while_(
  evaluate: Any, equation: jex.JaxprEqn, operands: list[Any]
) -> Results:
  """A loop's constants stay lazy, and what it carries along unchanged."""
  params = equation.params
  first = params['cond_nconsts']
  last = first + params['body_nconsts']
  test, body = params['cond_jaxpr'], params['body_jaxpr']
  invars = body.jaxpr.invars[params['body_nconsts'] :]
  fixed = _fixed(_results(body.jaxpr), invars, operands[last:])
  carry = _others(operands[last:], fixed, evaluate, equation)

  def goes_on(carry: list[Any]) -> jax.Array:
    inputs = [*operands[:first], *_put_back(fixed, carry)]
    (found,) = evaluate(test.jaxpr, test.consts, inputs)
    return found

  def turn(carry: list[Any]) -> list[Any]:
    inputs = [*operands[first:last], *_put_back(fixed, carry)]
    found = evaluate(body.jaxpr, body.consts, inputs)
    return _others(found, fixed, evaluate, equation)

  return _put_back(fixed, jax.lax.while_loop(goes_on, turn, carry))


def _results(program: jex.Jaxpr) -> list[Any]:
  """Returns the outputs of a program, each an input if it is only handed on.

  A call that hands on what it was given, as `nnx.remat` does with a layer, is
  looked through.
  """
  made = {
    out: (equation, i)
    for equation in program.eqns
    for i, out in enumerate(equation.outvars)
  }

  def origin(atom: Any) -> Any:
    if isinstance(atom, jex.Literal) or atom not in made:
      return atom
    equation, i = made[atom]
    if CONTROL.get(equation.primitive.name) not in (call, checkpoint):
      return atom
    inner, _ = _program(equation)
    result = _results(inner)[i]
    places = [k for k, var in enumerate(inner.invars) if var is result]
    return origin(equation.invars[places[0]]) if places else atom

  return list(map(origin, program.outvars))


def _handed_on(
  outvars: Sequence[Any], invars: Sequence[jex.Var], operands: Sequence[Any]
) -> HandedOn:
  """Returns the lazy operands that a program returns as they came."""
  lazy = [
    (var, x)
    for var, x in zip(invars, operands, strict=True)
    if isinstance(x, Flow)
  ]
  return {
    i: x for i, out in enumerate(outvars) for var, x in lazy if out is var
  }


def _fixed(
  outvars: Sequence[Any], invars: Sequence[jex.Var], operands: Sequence[Any]
) -> HandedOn:
  """Returns the lazy operands that every turn of a loop hands to the next."""
  return {
    i: x
    for i, (out, var, x) in enumerate(
      zip(outvars, invars, operands, strict=True)
    )
    if out is var and isinstance(x, Flow)
  }


def _others(
  values: Sequence[Any],
  handed_on: HandedOn,
  evaluate: Any,
  equation: jex.JaxprEqn,
) -> list[Any]:
  """Returns what is not handed on, as plain arrays."""
  return [
    evaluate.dense(value, equation)
    for i, value in enumerate(values)
    if i not in handed_on
  ]


def _put_back(handed_on: HandedOn, others: Sequence[Any]) -> list[Any]:
  """Returns all values in order, those that were handed on among them."""
  rest = iter(others)
  count = len(handed_on) + len(others)
  return [handed_on[i] if i in handed_on else next(rest) for i in range(count)]


CONTROL: dict[str, Callable[..., Results]] = {
  'checkpoint': checkpoint,
  'closed_call': call,
  'cond': cond,
  'core_call': call,
  'jit': call,
  'pjit': call,
  'remat2': checkpoint,
  'scan': scan,
  'while': while_,
}
