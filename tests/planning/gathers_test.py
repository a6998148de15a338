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
MOVED = re.compile(r'= (.*) (?:all-gather|all-to-all)(?:-start)?\(')
ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('target', ['h100-8', 'v5e-8'])
def test_codes_are_gathered_and_kernels_are_not(
  monkeypatch, llama, make_spec, target
):
  texts = []
  monkeypatch.setattr(module, 'moved_bytes', lambda text: texts.append(text))
  sizes = dataclasses.replace(llama, layers=2)
  planner = Planner(sizes, find_machine(target))
  spec = make_spec(train__batch_size=8, data__max_length=512)
  planner.estimate(planner.prepare(spec))
  arrays = [
    (dtype, math.prod(int(n) for n in shape.split(',') if n))
    for results in MOVED.findall(texts[0])
    for dtype, shape in ARRAY.findall(results)
  ]
  moved = {size for dtype, size in arrays if dtype != 'u8'}
  assert moved.isdisjoint(KERNELS), 'a kernel is gathered as floats'
  assert max(moved) < VOCAB / 8, 'the embedding or the head is gathered'
  assert {size for dtype, size in arrays if dtype == 'u8'} >= {
    size // 2 for size in KERNELS
  }


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('target', ['h100', 'a6000'])
def test_scratch_is_below_two_layers_dense_kernels(llama, make_spec, target):
  planner = Planner(llama, find_machine(target))
  spec = make_spec(train__batch_size=1, data__max_length=512)
  scratch = planner.estimate(planner.prepare(spec)).parts['scratch']
  layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
  assert scratch < 2 * layer
