"""The machine's rate: nothing but the model's matrix products, in float32."""

import functools
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.harness import worker

REPEATS = 15


def run(work: Mapping[str, Any]) -> dict[str, Any]:
  """Times each product alone, [rows, in] by [in, out].

  Args:
    work: `rows`, and `kernels`: triples of in, out and how often there is one.

  Returns:
    `flops_per_s` over all kernels.
  """
  multiply = jax.jit(jnp.matmul)
  flops = seconds = 0.0
  for rows, columns, count in work['kernels']:
    x = jnp.ones((work['rows'], rows))
    kernel = jnp.ones((rows, columns))
    seconds += count * _median(functools.partial(multiply, x, kernel))
    flops += count * 2 * math.prod((work['rows'], rows, columns))
  return {'flops_per_s': flops / seconds}


def _median(product: Any) -> float:
  """Returns the median seconds of a product, after one that is not counted."""
  taken = []
  for _ in range(REPEATS + 1):
    start = time.perf_counter()
    jax.block_until_ready(product())
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[1:])


if __name__ == '__main__':
  worker.serve(run)
