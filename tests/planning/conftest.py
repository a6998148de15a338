"""Runs and planners for small decoders."""

import dataclasses
import pathlib

import pytest

from jlora.config import default_config, default_quant, resolve
from jlora.errors import MissingCompilerError
from jlora.models.config import DecoderConfig
from jlora.parallel.machines import find_machine
from jlora.planning import planner as module
from jlora.planning.planner import Planner
from jlora.planning.sizes import read_sizes

BASES = pathlib.Path(__file__).parents[2] / 'tpu' / 'bases'
SMALL = DecoderConfig(
  vocab_size=2048,
  embed_dim=128,
  mlp_dim=512,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=32,
  max_positions=4096,
)


@pytest.fixture(scope='session')
def small():
  return SMALL


@pytest.fixture(scope='session')
def llama():
  """Llama-3.1-8B, of four layers."""
  sizes = read_sizes(str(BASES / 'llama-3.1-8b.json'))
  return dataclasses.replace(sizes, layers=4)


@pytest.fixture(scope='session')
def make_spec():
  """Makes a run from fields such as `train__batch_size`."""

  def make(*, quant=True, **fields):
    config = default_config()
    config.quant = default_quant() if quant else None
    config.data.train = 'unused.jsonl'
    config.train.steps = 10
    for name, value in fields.items():
      section, field = name.split('__')
      config[section][field] = value
    return resolve(config)

  return make


@pytest.fixture
def make_counting(monkeypatch):
  """Makes planners whose machine has no compiler here."""

  def refuse(machine):
    raise MissingCompilerError(f'no compiler for {machine.name}')

  monkeypatch.setattr(module, 'devices_of', refuse)

  def make(target, *, config=SMALL, memory=None):
    machine = find_machine(target)
    if memory is not None:
      machine = dataclasses.replace(machine, memory=memory)
    return Planner(config, machine)

  return make
