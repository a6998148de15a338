"""Facts of jlora.parallel.machines."""

import pytest

from jlora.errors import ConfigError
from jlora.parallel.machines import GIB, RELATIVES, find_machine, specified


@pytest.mark.parametrize(
  ('name', 'devices', 'kind', 'gib'),
  [
    ('h100', 1, 'h100', 79.1),
    ('h100-8', 8, 'h100', 79.1),
    ('a100-40', 1, 'a100-40', 39.4),
    ('a100-40-4', 4, 'a100-40', 39.4),
    ('a6000', 1, 'a6000', 47.5),
    ('v5e-16', 16, 'v5e:4x4', 15.75),
    ('v5p-64', 64, 'v5p:4x4x4', 95.74),
    ('v6e-8', 8, 'v6e:2x4', 31.25),
  ],
)
def test_a_name_says_devices_and_memory(name, devices, kind, gib):
  machine = find_machine(name)
  assert (machine.devices, machine.kind) == (devices, kind)
  assert machine.memory / GIB == pytest.approx(gib, abs=0.05)
  assert not machine.relative
  assert name in machine.describe()


@pytest.mark.parametrize(
  ('name', 'devices', 'gib'),
  [('rtx4090', 1, 24), ('l40s-4', 4, 48), ('gpu-12gb', 1, 12)],
)
def test_a_card_without_a_specification_is_marked(name, devices, gib):
  machine = find_machine(name)
  assert (machine.devices, machine.memory) == (devices, gib * GIB)
  assert machine.relative
  assert 'relative a6000' in machine.describe()


def test_every_relative_has_a_specification():
  assert {kind for _, kind in RELATIVES.values()} <= set(specified())


def test_a_program_on_a_gpu_cannot_have_all_memory():
  machine = find_machine('h100')
  assert machine.usable == int(0.94 * machine.memory)


@pytest.mark.parametrize('name', ['b7000', 'h100-0', 'gpu-gb', '', 'cpux'])
def test_an_unknown_target_lists_the_known_ones(name):
  with pytest.raises(
    ConfigError, match=r'is not known; use cpu, .*h100.*v5p-4'
  ):
    find_machine(name)


@pytest.mark.parametrize('name', ['v5e', 'v5e-3', 'v5p-1', 'v6e-eight'])
def test_a_slice_that_is_not_made_lists_those_that_are(name):
  with pytest.raises(ConfigError, match=r'its chips can be .*8'):
    find_machine(name)
