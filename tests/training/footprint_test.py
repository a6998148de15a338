import jax
import pytest

from jlora.parallel.mesh import make_mesh
from jlora.training.footprint import measure
from jlora.training.step import make_step

# A layer: q and o 64 x 64, k and v 64 x 32, three of 64 x 96, two norms.
KERNELS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
NORMS = 2 * 2 * 64 + 64
ADAPTERS = 4 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))


@pytest.fixture(scope='module')
def measured(make_run, make_batch):
  """A compiled step, made of shapes alone, and its footprint."""
  run = make_run(abstract=True, train_full='.*norm/scale')
  state, batch = run.abstract_state(), make_batch(2, 8, abstract=True)
  step = make_step(run.loss_fn, run.tx, make_mesh(devices=jax.devices()[:1]))
  compiled = step.lower(state, run.frozen, batch).compile()
  trained = ADAPTERS + NORMS
  return compiled, measure(run.frozen, state, compiled, trained=trained)


def test_parameters_are_counted_once(measured):
  _, footprint = measured
  assert footprint.frozen_params == KERNELS + 160 * 64
  assert footprint.trainable_params == ADAPTERS + NORMS


def test_bytes_by_part_are_those_of_the_arrays(measured):
  compiled, footprint = measured
  parts = footprint.bytes
  assert parts['frozen, dense'] == 4 * 160 * 64
  # 96 inputs are padded to two blocks of 64; scales take a byte, and 2 * 7
  # second-level scales and offsets four.
  padded = KERNELS + 2 * 32 * 64
  assert (
    parts['frozen, quantized'] == padded // 2 + padded // 64 + 2 * 2 * 7 * 4
  )
  assert parts['trainable'] == 4 * (ADAPTERS + NORMS)
  moments = 2 * parts['trainable']
  assert 0 <= parts['optimizer state'] - moments <= 64  # counters
  scratch = compiled.memory_analysis().temp_size_in_bytes
  assert parts['scratch of a step'] == scratch


def test_the_peak_holds_every_part_once(measured):
  _, footprint = measured
  # The state is donated: what comes out lies where it went in.
  total = sum(footprint.bytes.values())
  assert 0 <= footprint.compiled_peak - total <= 4096


def test_the_table_names_every_part(measured):
  _, footprint = measured
  rows = dict(footprint.rows())
  assert set(footprint.bytes) < set(rows)
  total = footprint.frozen_params + footprint.trainable_params
  assert rows['parameters'].startswith(f'{total:,}')
