"""The compiled peak on a CPU is that of a process that trains."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Trains for a few steps on random weights made where they are used, and says
# what the plan predicted and how much memory the process took for it.
SCRIPT = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from jlora.config import default_config, default_quant, resolve
from jlora.models.config import DecoderConfig
from jlora.parallel.machines import find_machine
from jlora.parallel.mesh import make_mesh
from jlora.planning.planner import Planner
from jlora.training.halves import abstract_halves
from jlora.training.program import abstract_batch, make_program

def field(name):
  text = pathlib.Path('/proc/self/status').read_text()
  return int(text.split(name)[1].split()[0]) * 1024

config = DecoderConfig(
  vocab_size=49152, embed_dim=576, mlp_dim=1536, layers=30, heads=9,
  kv_heads=3, head_dim=64)
fields = default_config()
fields.quant = default_quant() if sys.argv[1] == 'nf4' else None
fields.data.train = 'x'
fields.data.max_length = 512
fields.train.update(batch_size=8, steps=10)
planner = Planner(config, find_machine('cpu'))
spec = planner.prepare(resolve(fields))
predicted = planner.estimate(spec).peak
mesh = make_mesh(devices=jax.devices()[:1])
halves = abstract_halves(spec, config, jnp.float32, mesh, 10)
batch = abstract_batch(spec, mesh)
args = halves.state, halves.frozen, batch
step = make_program(spec, config, halves, mesh).step.lower(*args).compile()
before = field('VmRSS:')
state, frozen, batch = jax.tree.map(
  lambda x: jnp.ones(x.shape, x.dtype), args)
for _ in range(3):
  state, metrics = step(state, frozen, batch)
jax.block_until_ready(state)
print(json.dumps([predicted, field('VmHWM:') - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('form', ['nf4', 'dense'])
def test_a_plan_is_within_15_percent_of_the_process(form):
  ended = subprocess.run(
    [sys.executable, '-c', SCRIPT, form],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr
  predicted, taken = json.loads(ended.stdout)
  print(form, predicted, taken, predicted / taken)  # pytest -rP shows it
  assert 0.85 <= predicted / taken <= 1.15
