"""Drawn products: any layout of the kernel, any order of any operand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
  """An einsum with a kernel, by the letters of its axes.

  Attributes:
    sizes: Of each letter.
    roles: Letters of the kernel's stacked, input and output axes.
    kernel: Letters in the kernel's order.
    x: Letters in the input's order.
    y: Letters in the result's order.
    kernel_first: Whether the kernel is the first operand.
  """

  sizes: dict
  roles: tuple
  kernel: str
  x: str
  y: str
  kernel_first: bool

  @property
  def axes(self):
    stacked, inputs, outputs = (' '.join(side) for side in self.roles)
    bar = f'{stacked} | ' if stacked else ''
    return f'{" ".join(self.kernel)}: {bar}{inputs} -> {outputs}'

  def __call__(self, w, x):
    if self.kernel_first:
      return jnp.einsum(f'{self.kernel},{self.x}->{self.y}', w, x)
    return jnp.einsum(f'{self.x},{self.kernel}->{self.y}', x, w)

  def shape(self, letters):
    return tuple(self.sizes[letter] for letter in letters)


@st.composite
def products(draw):
  def letters(pool, low, high):
    return pool[: draw(st.integers(low, high))]

  def mixed(letters):
    return ''.join(draw(st.permutations(letters)))

  stacked, inputs = letters('lm', 0, 2), letters('ij', 1, 2)
  outputs, free = letters('op', 1, 2), letters('bc', 0, 2)
  summed = draw(st.sampled_from([inputs, outputs]))
  batched = ''.join(s for s in stacked if draw(st.booleans()))
  made = outputs if summed == inputs else inputs
  every = stacked + inputs + outputs + free
  sizes = {name: draw(st.integers(1, 3)) for name in every}
  return Product(
    sizes=sizes,
    roles=(stacked, inputs, outputs),
    kernel=mixed(stacked + inputs + outputs),
    x=mixed(batched + summed + free),
    y=mixed(stacked + made + free),
    kernel_first=draw(st.booleans()),
  )


def compare(product, quantized, kernel, x):
  """Returns value and gradients, lifted and through merge."""
  fields = {'targets': '.*', 'axes': {'.*': product.axes}}
  spec = jlora.LoraSpec(rank=1, alpha=2.0, **fields)
  quant = jlora.QuantSpec(block_size=2, **fields) if quantized else None
  frozen, trainable = jlora.partition(
    jax.random.key(0), {'w': kernel}, spec, quant=quant
  )
  trainable = jax.tree.map(lambda t: t + 0.5, trainable)

  def loss(run, params, trainable, x):
    y = run(params(frozen, trainable, spec)['w'], x)
    return jnp.sin(y.astype(jnp.float32)).sum(), y

  lifted = jlora.lift(product, on_missing='error')
  grad = jax.value_and_grad(loss, (2, 3), has_aux=True)
  return (
    grad(lifted, jlora.combine, trainable, x),
    grad(product, jlora.merge, trainable, x),
  )


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(products(), st.booleans(), st.sampled_from(['float32', 'bfloat16']))
def test_a_drawn_product_is_that_of_merge(product, quantized, dtype):
  random = np.random.default_rng(0)
  kernel, x = (
    jnp.asarray(random.standard_normal(product.shape(letters)), dtype)
    for letters in (product.kernel, product.x)
  )
  run = jax.jit(compare, static_argnums=(0, 1))
  results = run(product, quantized, kernel, x)
  # Sums of at most 9 products below 8 each: in bfloat16, 8 bits of them.
  bound = 1e-4 if dtype == 'float32' else 72 * 2**-8
  for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    ours, theirs = (np.asarray(v, np.float64) for v in (ours, theirs))
    size = max(1.0, np.abs(theirs).max(initial=0))
    assert np.abs(ours - theirs).max(initial=0) <= bound * size
