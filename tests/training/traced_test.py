"""Facts of jlora.training.traced."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jlora.training.traced import count_flops, count_kept

X, W = jnp.zeros((3, 4)), jnp.zeros((4, 5))
ONE = 2 * 3 * 4 * 5


def scanned(x, w):
  def body(carry, _):
    return carry, x @ w

  return jax.lax.scan(body, 0, length=7)


def branched(x, w):
  return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: (x @ w) + (x @ w))


def grouped(x, w):
  sizes = jnp.array([1, 2])
  return jax.lax.ragged_dot(x, jnp.stack([w, w]), sizes)


def of_groups(x, w):
  stack = jnp.stack([w, w])

  def run(stack):
    return jax.lax.ragged_dot(x, stack, jnp.array([1, 2])).sum()

  return jax.grad(run)(stack)


def shared(x, w):
  mesh, cut = AbstractMesh((3,), ('data',), (AxisType.Auto,)), P('data')
  return jax.shard_map(
    jnp.matmul, mesh=mesh, in_specs=(cut, P()), out_specs=cut
  )(x, w)


@pytest.mark.parametrize(
  ('run', 'times'),
  [
    (grouped, 1),
    (of_groups, 2),  # the value and the gradient of both kernels
    (shared, 1),
    (jnp.matmul, 1),
    (scanned, 7),
    (branched, 2),
    (jax.jit(scanned), 7),
    (jax.checkpoint(jnp.matmul), 1),
    (lambda x, w: jnp.einsum('bij,jk->bik', x[None].repeat(6, 0), w), 6),
    (lambda x, w: jnp.sin(x).sum() + w.sum(), 0),
  ],
)
def test_products_count_as_often_as_they_run(run, times):
  assert count_flops(jax.make_jaxpr(run)(X, W)) == times * ONE


def test_a_pallas_kernel_counts_once_a_block():
  def kernel(x, w, y):
    y[...] = x[...] @ w[...]

  def run(x, w):
    return pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct((12, 5), x.dtype),
      grid=(4,),
      in_specs=[
        pl.BlockSpec((3, 4), lambda i: (i, 0)),
        pl.BlockSpec((4, 5), lambda i: (0, 0)),
      ],
      out_specs=pl.BlockSpec((3, 5), lambda i: (i, 0)),
    )(x, w)

  x = jnp.zeros((12, 4))
  assert count_flops(jax.make_jaxpr(run)(x, W)) == 4 * ONE


def test_what_is_recomputed_counts_again():
  def loss(x, w):
    return jnp.sum(jnp.sin(x @ w) ** 2)

  plain = count_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(X, W))
  again = count_flops(
    jax.make_jaxpr(jax.grad(jax.checkpoint(loss), (0, 1)))(X, W)
  )
  assert (plain, again) == (3 * ONE, 4 * ONE)


# Without remat, the two cosines and the inner sine; with it, the layer's input.
@pytest.mark.parametrize(('remat', 'arrays'), [(False, 3), (True, 1)])
def test_a_loop_keeps_what_its_backward_pass_reads(remat, arrays):
  def body(x, w):
    return jnp.sin(jnp.sin(x) * w), None

  def loss(x, ws):
    layer = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(layer, x, ws)[0].sum()

  def microbatches(x, ws):
    def add(total, x):
      return jax.tree.map(jnp.add, total, jax.grad(loss, (0, 1))(x, ws)), None

    zeros = jax.tree.map(jnp.zeros_like, (x, ws))
    return jax.lax.scan(add, zeros, jnp.stack([x, x]))[0]

  def size(array):
    return math.prod(array.shape) * array.dtype.itemsize

  x, ws = jnp.zeros(1000), jnp.zeros((5, 1000))
  for run in (jax.grad(loss, (0, 1)), microbatches):
    kept = count_kept(jax.make_jaxpr(run)(x, ws), size)
    assert kept == arrays * 5 * 1000 * 4  # and not the weights
