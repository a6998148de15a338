"""What a compiled step writes to memory, by hand and as real compilers do."""

import collections
import math

import pytest

from jlora.parallel.machines import find_machine
from jlora.planning import planner as module
from jlora.planning.planner import Planner
from jlora.planning.written import written_arrays, written_kernels

# A loop of five that decodes a kernel [64, 48] within a fusion, by its planes,
# and keeps another on the chip; branches of which the larger counts.
PROGRAM = """\
HloModule jit_step

%fused (p: u8[32,48]) -> bf16[64,48] {
  %p = u8[32,48]{1,0} parameter(0)
  %wide = f32[64,48]{1,0} convert(%p)
  ROOT %kernel = bf16[64,48]{1,0} convert(%wide)
}

%body (s: (s32[], u8[32,48])) -> (s32[], u8[32,48]) {
  %s = (s32[], u8[32,48]{1,0}) parameter(0)
  %codes = u8[32,48]{1,0} get-tuple-element(%s), index=1
  %kernel = bf16[1,64,48]{2,1,0} fusion(%codes), kind=kLoop, calls=%fused
  %planes = (bf16[32,48]{1,0}, bf16[32,48]{1,0}) fusion(%codes), calls=%fused
  %chip = f32[64,48]{1,0:T(8,128)S(1)} convert(%kernel)
  %start = (bf16[64,48]{1,0}, bf16[64,48]{1,0}) copy-start(%kernel)
  ROOT %next = (s32[], u8[32,48]{1,0}) tuple(%i, %codes)
}

%test (s: (s32[], u8[32,48])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

%small (x: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} negate(%x)
}

%large (x: f32[8]) -> f32[8] {
  %kernel = f32[64,6,8]{2,1,0} broadcast(%x)
  ROOT %y = f32[8]{0} negate(%x)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop = (s32[], u8[32,48]{1,0}) while(%init), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %activation = f32[48,64]{1,0} broadcast(%x), dimensions={0}
  ROOT %y = f32[8]{0} conditional(%i, %x, %x), \
branch_computations={%small, %large}
}
"""


TWO_WAY = PROGRAM.replace(
  'branch_computations={%small, %large}',
  'true_computation=%small, false_computation=%large',
)


@pytest.mark.parametrize('program', [PROGRAM, TWO_WAY], ids=['index', 'pred'])
def test_a_loop_writes_as_often_as_it_runs_and_a_fusion_its_result(program):
  found = written_arrays(program)
  assert found == {
    ('bf16', (64, 48)): 5,
    ('bf16', (32, 48)): 10,
    ('f32', (64, 6, 8)): 1,
    ('f32', (48, 64)): 1,
    ('f32', (8,)): 1,
  }


def test_kernels_and_their_planes_are_told_from_activations():
  size = 64 * 48
  found = written_kernels(PROGRAM, [(64, 48)])
  assert found == {'bf16': 2 * (5 + 5) * size, 'f32': 4 * size}
  assert written_kernels(PROGRAM, [(48, 8)]) == {}


def test_a_plan_says_what_decoding_writes(small, make_spec):
  planner = Planner(small, find_machine('cpu'))
  quantized, dense = (
    planner.estimate(
      planner.prepare(make_spec(train__batch_size=1, quant=quant))
    )
    for quant in (True, False)
  )
  kernels = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512
  # Forward, again, and backward; the last product is not made again.
  assert quantized.written['f32'] >= 3 * 2 * 4 * kernels
  rows = dict(quantized.rows())
  assert 'GiB written a step' in rows['kernels decoded, f32']
  assert dense.written == {}


ROWS, LENGTH, CHUNK = 2, 384, 256


@pytest.fixture(scope='module', params=['h100', 'v5e-1'])
def compiled(request, llama, make_spec):
  """A compiled QLoRA step of Llama-3.1-8B's sizes, its text, and the plan."""
  texts = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, 'moved_bytes', lambda text: texts.append(text) or {})
    planner = Planner(llama, find_machine(request.param))
    spec = make_spec(
      train__batch_size=ROWS, data__max_length=LENGTH, train__loss_chunk=CHUNK
    )
    estimate = planner.estimate(planner.prepare(spec))
  return written_arrays(texts[0]), estimate, llama


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
def test_no_dense_kernel_is_written_in_float32(compiled):
  _, estimate, c = compiled
  assert set(estimate.written) == {'bf16'}
  layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
  once = 2 * c.layers * layer
  # Forward, again and backward; a TPU writes planes and puts them together.
  assert 2 * once < estimate.written['bf16'] < 6.5 * once


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
def test_logits_are_never_all_there_at_once(compiled):
  arrays, _, c = compiled
  largest = max(math.prod(s) for _, s in arrays if c.vocab_size in s)
  assert largest == CHUNK * c.vocab_size < ROWS * LENGTH * c.vocab_size


@pytest.mark.aot
@pytest.mark.filterwarnings('ignore')
def test_gradients_of_adapters_are_float32(compiled):
  arrays, _, c = compiled
  sides = [(4096, 16)] * 6 + [(14336, 16)]
  sides += [(16, 4096)] * 3 + [(16, 1024)] * 2 + [(16, 14336)] * 2
  stacks = collections.Counter((c.layers, *pair) for pair in sides)
  # The loop over layers writes gradients; copies in bfloat16 are made outside.
  often = {
    (dtype, sides)
    for (dtype, sides), n in arrays.items()
    if sides in stacks and n >= stacks[sides] * c.layers
  }
  assert often == {('f32', shape) for shape in stacks}
