"""No frozen kernel of a real size moves as floats, on GPUs and TPUs."""

import dataclasses
import math
import re

import pytest

from jlora.parallel.machines import find_machine
from jlora.planning import planner as module
from jlora.planning.planner import Planner

KERNELS = {4096 * 4096, 4096 * 1024, 4096 * 14336}
VOCAB = 4096 * 128256
GATHERS = r'all-gather|all-to-all'
ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
BYTES = {'u8': 1, 'u32': 4}  # of codes; some devices move four in a word


def moved(text, kinds):
  """Returns dtype and size of what devices exchange, as compiled."""
  results = re.findall(rf'= (.*) (?:{kinds})(?:-start)?\(', text)
  return {
    (dtype, math.prod(int(n) for n in shape.split(',') if n))
    for arrays in results
    for dtype, shape in ARRAY.findall(arrays)
  }


# For 64 chips the compiler writes every gather as an all-reduce.
@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('target', ['h100-8', 'v5e-8', 'v5p-64'])
def test_codes_are_gathered_and_kernels_are_not(
  monkeypatch, llama, make_spec, target
):
  texts = []
  monkeypatch.setattr(module, 'moved_bytes', lambda text: texts.append(text))
  sizes = dataclasses.replace(llama, layers=2)
  machine = find_machine(target)
  planner = Planner(sizes, machine)
  # No number of tokens that an activation would have the size of a kernel of.
  spec = make_spec(train__batch_size=machine.devices, data__max_length=384)
  planner.estimate(planner.prepare(spec))
  arrays = moved(texts[0], f'{GATHERS}|all-reduce')
  floats = {size for dtype, size in arrays if dtype not in BYTES}
  halves = {size // 2 for size in KERNELS}  # of the rows
  assert floats.isdisjoint(KERNELS | halves), 'a kernel is gathered as floats'
  assert VOCAB not in floats, 'the embedding or the head is gathered'
  gathered = moved(texts[0], GATHERS)
  largest = max((n for dtype, n in gathered if dtype not in BYTES), default=0)
  assert largest < VOCAB / 8, 'the embedding or the head is gathered'
  codes = {size * BYTES[dtype] for dtype, size in arrays if dtype in BYTES}
  assert codes >= halves


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('target', ['h100', 'a6000', 'v5e-1'])
def test_scratch_is_below_two_layers_dense_kernels(llama, make_spec, target):
  planner = Planner(llama, find_machine(target))
  spec = make_spec(train__batch_size=1, data__max_length=512)
  scratch = planner.estimate(planner.prepare(spec)).parts['scratch']
  layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
  assert scratch < 2 * layer
