import subprocess
import sys

import jax
import numpy as np

from jlora.data.packing import make_batch


def test_a_batch_is_a_pytree_of_five_arrays(make_examples):
  batch = make_batch([make_examples([5])], batch_size=2, max_length=8)
  assert [leaf.shape for leaf in jax.tree.leaves(batch)] == [(2, 8)] * 5
  doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(batch)
  np.testing.assert_array_equal(doubled.targets, 2 * batch.targets)


def test_importing_it_loads_nothing_heavy():
  code = (
    'import sys, jlora.data.batch, jlora.data.loader;'
    ' print(*({"datasets", "transformers", "torch"} & set(sys.modules)))'
  )
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert run.stdout.strip() == ''
