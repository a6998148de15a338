"""Facts of jlora.planning.collectives."""

import pytest

from jlora.planning.collectives import moved_bytes
from jlora.planning.hlo import bytes_of

# In XLA's notation: a loop of five gathers on their own and in a fusion, a
# start with its end, and collectives outside.
PROGRAM = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: u8[4,16]) -> u8[32,16] {
  %p = u8[4,16]{1,0:T(8,128)(4,1)} parameter(0)
  ROOT %gathered = u8[32,16]{1,0:T(8,128)S(1)} all-gather(%p), dimensions={0}
}

%body (s: (s32[], u8[4,16])) -> (s32[], u8[4,16]) {
  %s = (s32[], u8[4,16]{1,0}) parameter(0)
  %part = u8[4,16]{1,0} get-tuple-element(%s), index=1
  %wide = u8[32,16]{1,0} fusion(%part), kind=kCustom, calls=%fused
  %start = ((u8[4,16]{1,0}, bf16[2]{0}), (u8[32,16]{1,0}, bf16[16]{0})) \
all-gather-start(%part, %other), channel_id=1, dimensions={0}
  %other = bf16[2]{0} constant({0, 0})
  %done = (u8[32,16]{1,0}, bf16[16]{0}) all-gather-done(%start)
  ROOT %next = (s32[], u8[4,16]{1,0}) tuple(%i, %part)
}

%test (s: (s32[], u8[4,16])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), sharding={devices=[8]<=[8]}
  %loop = (s32[], u8[4,16]{1,0}) while(%init), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}
  %scattered = f32[1]{0} reduce-scatter(%x), dimensions={0}, to_apply=%add
  ROOT %all = f32[8]{0} all-reduce(%x), channel_id=3, to_apply=%add, \
metadata={op_name="all-gather(%x)"}
}
"""


def test_a_loop_counts_as_often_as_it_runs():
  each = 32 * 16 + (32 * 16 + 2 * 16)
  assert moved_bytes(PROGRAM)['all-gather'] == 5 * each


def test_a_loop_that_is_not_counted_runs_up_to_its_limit():
  known = 'backend_config={"known_trip_count":{"n":"5"},'
  program = PROGRAM.replace(known, 'backend_config={')
  program = program.replace(
    'ROOT %less = pred[] constant(true)',
    '%limit = s32[]{:T(128)} constant(7)\n'
    '  ROOT %less = pred[] compare(%i, %limit), direction=LT',
  )
  gathers = moved_bytes(PROGRAM)['all-gather']
  assert moved_bytes(program)['all-gather'] == gathers // 5 * 7


def test_the_lines_of_one_channel_count_once():
  line = '  %scattered = f32[1]'
  again = '  %again = f32[8]{0} all-reduce(%x), channel_id=3, to_apply=%add\n'
  assert moved_bytes(PROGRAM.replace(line, again + line)) == moved_bytes(
    PROGRAM
  )


def test_the_larger_side_of_a_collective_counts():
  moved = moved_bytes(PROGRAM)
  assert moved['reduce-scatter'] == 8 * 4
  assert moved['all-reduce'] == 8 * 4


def test_a_program_without_collectives_moves_nothing():
  assert moved_bytes(PROGRAM.split('%body')[0]) == {}


@pytest.mark.parametrize(
  ('text', 'size'),
  [
    ('f32[2,3]{1,0:T(8,128)S(1)}', 24),
    ('(u8[4], bf16[8]{0}, pred[2])', 4 + 16 + 2),
    ('f32[]', 4),
    ('s4[6]', 3),
    ('f8e4m3fn[5]', 5),
    ('token[]', 0),
  ],
)
def test_a_type_has_its_bytes(text, size):
  assert bytes_of(text) == size
