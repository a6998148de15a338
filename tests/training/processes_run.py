"""Loads and trains in one of several processes; run by processes_test.py.

  python processes_run.py BASE FOLDER HOST:PORT PROCESSES PROCESS

Four devices in all. One process alone leaves in the folder what one device
loads and trains, and loads once more over all of them; several load and train.
Prints a line of JSON: how far both lie from what the one device gave, and how
much each process read of the kernels.
"""

import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.bases import open_base
from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec
from jlora.core.tree import leaves_by_path
from jlora.data.batch import Batch
from jlora.models import layout
from jlora.parallel import processes
from jlora.parallel.mesh import by_example, make_mesh
from jlora.training.halves import abstract_halves, load_halves
from jlora.training.optimizers import OptimSpec
from jlora.training.program import make_program
from jlora.training.requirements import resolve
from jlora.training.run_spec import (
  DataSpec,
  EvalSpec,
  LogSpec,
  MeshSpec,
  RunSpec,
  TrainSpec,
)

STEPS = 10
LORAS = {
  'lora': {'targets': 'all-linear'},
  'dora': {'targets': 'mlp', 'variant': 'dora', 'train_full': '.*/scale'},
  'rows': {'targets': 'attention', 'train_rows': {'embed/embedding': (3, 5)}},
  'pissa': {'targets': 'mlp', 'init': 'pissa'},
}
CASES = {
  # quantized, LORAS, mesh, most processes, whether it trains
  'nf4 lora': (True, 'lora', (1, 2, 2), 4, True),
  'plain lora': (False, 'lora', (1, 4, 1), 4, True),
  'nf4 dora': (True, 'dora', (1, 4, 1), 2, False),
  'nf4 rows': (True, 'rows', (1, 4, 1), 2, False),
  'nf4 pissa': (True, 'pissa', (1, 4, 1), 2, False),
}


def make_spec(base, quantized, lora):
  return RunSpec(
    base=str(base),
    quant=QuantSpec(block_size=16) if quantized else None,
    lora=LoraSpec(rank=4, **LORAS[lora]),
    data=DataSpec(train='none.jsonl', max_length=16),
    train=TrainSpec(batch_size=4, steps=STEPS),
    # An eps above the noise of a sum: else Adam makes it whole updates.
    optim=OptimSpec(schedule='constant', warmup=0, eps=1e-4),
    eval=EvalSpec(),
    mesh=MeshSpec(),
    log=LogSpec(),
  )


def make_batch(mesh):
  """A batch of which this process makes only the rows that it holds."""
  sharding = by_example(mesh)
  mine = processes.rows_here(4, sharding)
  tokens = np.random.default_rng(0).integers(0, 300, (4, 17)).astype('i4')
  fields = Batch(
    tokens=tokens[:, :-1],
    targets=tokens[:, 1:],
    loss_mask=np.ones((4, 16), 'f4'),
    segment_ids=np.ones((4, 16), 'i4'),
    positions=np.tile(np.arange(16, dtype='i4'), (4, 1)),
  )
  return jax.tree.map(
    lambda x: processes.spread(x[mine], sharding, rows=4, first=mine.start),
    fields,
  )


def load(spec, mesh):
  """Returns base, resolved spec, halves and the weights read of each leaf."""
  base = open_base(spec.base)
  spec = resolve(spec, base.config)
  model, read = base.model, {}
  plain = model.read

  def counted(name, dtype, index=None):
    found = plain(name, dtype, index)
    read[name] = read.get(name, 0) + found.size
    return found

  model.read = counted
  halves = abstract_halves(spec, base.config, jnp.float32, mesh, STEPS)
  return base, spec, load_halves(spec, base, halves, None), read


def train(spec, base, halves, mesh):
  step = make_program(spec, base.config, halves, mesh).step
  state, losses = halves.state, []
  for _ in range(STEPS):
    state, metrics = step(state, halves.frozen, make_batch(mesh))
    losses.append(metrics['loss'])
  return {'losses': losses, 'adapters': state.trainable}


def run(spec, mesh, trains):
  """Returns the arrays that come of a spec by name, and what was read."""
  base, spec, halves, read = load(spec, mesh)
  trees = {'frozen': halves.frozen, 'trainable': halves.state.trainable}
  trees = jax.tree.map(processes.whole, trees)  # the step takes the arrays
  if trains:
    trees |= jax.tree.map(processes.whole, train(spec, base, halves, mesh))
  return leaves_by_path(trees), largest_share(base, read)


def apart(mine, other):
  """Returns the largest relative distance of each tree's leaves."""
  found = {}
  for path, leaf in mine.items():
    expected = other[path].astype('f4')
    distance = np.linalg.norm(leaf.astype('f4') - expected)
    distance = float(distance / max(np.linalg.norm(expected), 1e-30))
    tree = path.split('/')[0]
    found[tree] = max(found.get(tree, 0.0), distance)
  return found


def largest_share(base, read):
  """Returns the largest share that was read of a layer's kernel."""
  shares = []
  for weight in layout.weights(base.config):
    if weight.path.startswith('layers/') and weight.transposed:
      size = math.prod(weight.shape) / len(weight.tensors)
      shares += [read.get(name, 0) / size for name in weight.tensors]
  return max(shares)


def report(base, folder, name, count):
  quantized, lora, axes, _, trains = CASES[name]
  spec, kept = make_spec(base, quantized, lora), folder / f'{name}.npz'
  if count == 1:
    alone, _ = run(spec, make_mesh(devices=jax.devices()[:1]), trains)
    np.savez(kept, **alone)
  arrays, share = run(spec, make_mesh(*axes), trains and count > 1)
  return {'read': share, **apart(arrays, np.load(kept))}


def main(base, folder, coordinator, count, index):
  count, folder = int(count), pathlib.Path(folder)
  if count > 1:
    processes.connect(coordinator, count, int(index))
  cases = [name for name, case in CASES.items() if case[3] >= count]
  found = {name: report(base, folder, name, count) for name in cases}
  print(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
