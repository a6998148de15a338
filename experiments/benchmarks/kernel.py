r"""Codes decoded on the way, beside decoding first, in products of few rows.

  python -m experiments.benchmarks.kernel

On a GPU: microseconds of one product with each NF4 kernel of an 8B model, by
rows, forward and transposed; `choice.ROWS` is to be where they meet. Kernels
are read from memory, not from a cache: each run goes over several of them,
apart and as a scan over their stack, which copies each layer's codes first.

Without a GPU: bytes that a product moves, from programs compiled for an H100
(needs the extra `cuda13`); a minute on two CPU cores. Nothing is run then.
"""

import functools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.core.axes import parse_roles
from jlora.core.kernels import few_rows
from jlora.core.quantization import quantize_leaf
from jlora.core.quantized import QuantizedArray, decode_matrix
from jlora.parallel import topology
from jlora.parallel.machines import find_machine
from jlora.parallel.mesh import make_mesh, replicated
from jlora.planning.collectives import bytes_of

# Of Llama-3.1-8B, [in, out]: q and o, k and v, gate and up, down, the head.
SHAPES = (
  (4096, 4096),
  (4096, 1024),
  (4096, 14336),
  (14336, 4096),
  (4096, 128256),
)
ROWS = (1, 2, 4, 8, 16, 32, 64)
TIMES = 20  # runs, of which the median is printed
ENOUGH = 256e6  # bytes of codes in a run: several times a large cache

Product = Callable[[jax.Array, QuantizedArray], jax.Array]


def decoded(
  x: jax.Array, kernel: QuantizedArray, *, transposed: bool
) -> jax.Array:
  """Returns the product with the kernel decoded first."""
  dense = decode_matrix(kernel)
  return jnp.dot(x, dense.T if transposed else dense)


def fused(
  x: jax.Array, kernel: QuantizedArray, *, transposed: bool
) -> jax.Array:
  """Returns the product with the kernel decoded on the way."""
  return few_rows.multiply(x, kernel, dtype=x.dtype, transposed=transposed)


WAYS = {'decoded first': decoded, 'on the way': fused}


def make_kernel(shape: tuple[int, ...]) -> QuantizedArray:
  """Returns a random NF4 kernel with double quantization, [(layers,) in, out].

  Its values matter to no time.
  """
  dense = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
  roles = parse_roles('layers | in -> out' if len(shape) == 3 else 'in -> out')
  return quantize_leaf(dense, roles, jlora.QuantSpec())


def input_of(
  shape: tuple[int, int], rows: int, transposed: bool
) -> jax.ShapeDtypeStruct:
  """Returns shape and dtype of what is multiplied."""
  return jax.ShapeDtypeStruct((rows, shape[transposed]), jnp.bfloat16)


def seconds(
  product: Product, x: jax.Array, kernels: QuantizedArray, *, scanned: bool
) -> float:
  """Returns the seconds of one product, the median of several runs.

  Args:
    product: Of one kernel.
    x: The same for all kernels.
    kernels: A stack of them.
    scanned: Whether one program goes over the stack, else over its parts.
  """
  count = kernels.stacked[0]
  given: Any = kernels
  if not scanned:
    given = [jax.tree.map(lambda v, i=i: v[i], kernels) for i in range(count)]

  @jax.jit
  def run(x: jax.Array, kernels: Any) -> Any:
    if scanned:
      return jax.lax.map(lambda kernel: product(x, kernel), kernels)
    return [product(x, kernel) for kernel in kernels]

  jax.block_until_ready(run(x, given))
  times = []
  for _ in range(TIMES):
    began = time.perf_counter()
    jax.block_until_ready(run(x, given))
    times.append(time.perf_counter() - began)
  return statistics.median(times) / count


def moved(product: Product, shape: tuple[int, int], x: Any) -> tuple[int, int]:
  """Returns the bytes that a product for an H100 moves, and its scratch bytes.

  Each operation of the compiled program reads its operands and writes its
  result once; what a fusion keeps to itself is in registers.
  """
  whole = replicated(
    make_mesh(devices=topology.devices_of(find_machine('h100')))
  )
  kernel = jax.eval_shape(functools.partial(make_kernel, shape))
  x, kernel = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=whole),
    (x, kernel),
  )
  traced = jax.jit(product).trace(x, kernel)
  compiled = traced.lower(lowering_platforms=('cuda',)).compile()
  scratch = compiled.memory_analysis().temp_size_in_bytes
  return bytes_moved(compiled.as_text()), scratch


def bytes_moved(text: str) -> int:
  """Returns the bytes that the operations of a program read and write.

  Args:
    text: From `compiled.as_text()`, of a program without loops.
  """
  entry = text[text.index('\nENTRY ') :]
  lines = re.findall(
    r'^\s+(?:ROOT )?%([\w.-]+) = (.+?) ([a-z-]+)\((.*?)\)', entry, re.MULTILINE
  )
  types = {name: kind for name, kind, *_ in lines}
  idle = ('parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element')
  return sum(
    bytes_of(kind)
    + sum(bytes_of(types[name]) for name in re.findall(r'%([\w.-]+)', operands))
    for _, kind, operation, operands in lines
    if operation not in idle
  )


def print_times() -> None:
  """Prints microseconds, by shape and rows."""
  print('| in x out | rows |', ' | '.join(_columns('apart', 'scanned')), '|')
  for shape in SHAPES:
    layers = max(2, int(ENOUGH / (shape[0] * shape[1] / 2)))
    kernels = jax.jit(make_kernel, static_argnums=0)((layers, *shape))
    for transposed in (False, True):
      for rows in ROWS:
        like = input_of(shape, rows, transposed)
        x = jax.random.normal(jax.random.key(1), like.shape, like.dtype)
        figures = [
          seconds(
            functools.partial(way, transposed=transposed),
            x,
            kernels,
            scanned=scanned,
          )
          for scanned in (False, True)
          for way in WAYS.values()
        ]
        _print_row(shape, transposed, rows, [1e6 * s for s in figures])


def print_bytes() -> None:
  """Prints megabytes, by shape and rows."""
  columns = [f'{name}, {way}' for way in WAYS for name in ('MB', 'MB scratch')]
  print('| in x out | rows |', ' | '.join(columns), '|')
  for shape in SHAPES:
    for transposed in (False, True):
      for rows in (1, 8, 32):
        x = input_of(shape, rows, transposed)
        figures = [
          size / 1e6
          for way in WAYS.values()
          for size in moved(
            functools.partial(way, transposed=transposed), shape, x
          )
        ]
        _print_row(shape, transposed, rows, figures)


def _columns(*ways: str) -> list[str]:
  return [f'us, {name}, {way}' for way in ways for name in WAYS]


def _print_row(
  shape: tuple[int, int], transposed: bool, rows: int, figures: list[float]
) -> None:
  name = f'{shape[0]} x {shape[1]}' + (' transposed' if transposed else '')
  cells = [name, str(rows), *(f'{figure:.1f}' for figure in figures)]
  print('|', ' | '.join(cells), '|', flush=True)


def main() -> None:
  """Prints a table: times on a GPU, else bytes."""
  if jax.default_backend() == 'gpu':
    print(jax.devices()[0].device_kind, 'jax', jax.__version__)
    print_times()
  else:
    print_bytes()


if __name__ == '__main__':
  main()
