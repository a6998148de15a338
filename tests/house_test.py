"""The plan of the package: what may import what, and what importing costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'jlora'
FLOORS = {
  'errors': 0,
  'version': 0,
  'core': 0,
  'models': 1,
  'parallel': 1,
  'checkpoints': 2,
  'data': 3,
  'inference': 4,
  'training': 5,
  'comparison': 6,
  'planning': 6,
}
TOP = 7  # config, front doors and what front doors share
ANYWHERE = ('errors', 'version')


def modules():
  return sorted(PACKAGE.rglob('*.py'))


def name_of(path):
  return path.relative_to(PACKAGE).with_suffix('').as_posix()


def room_of(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def floor_of(room):
  return FLOORS.get(room, TOP)


def imports(path):
  """Yields the dotted name of every import in a file, wherever it stands."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def rooms_imported(path):
  for name in imports(path):
    if name.split('.')[0] == 'jlora':
      yield [*name.split('.'), 'jlora'][1]


def is_front_door(path):
  return "__name__ == '__main__'" in path.read_text()


def test_every_folder_is_on_a_floor():
  folders = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
  assert folders == set(FLOORS) - set(ANYWHERE)


@pytest.mark.parametrize('path', modules(), ids=name_of)
def test_a_room_imports_itself_and_what_lies_below(path):
  room = room_of(path)
  if room == '__init__':
    allowed = {'core', *ANYWHERE}
  else:
    rooms = [*FLOORS, *map(room_of, PACKAGE.glob('*.py'))]
    allowed = {r for r in rooms if floor_of(r) < floor_of(room)}
    allowed |= {room, *ANYWHERE}
    if floor_of(room) == TOP:
      allowed |= {r for r in rooms if floor_of(r) == TOP}
  assert set(rooms_imported(path)) <= allowed


def test_no_front_door_is_imported():
  doors = {
    room_of(path) for path in PACKAGE.glob('*.py') if is_front_door(path)
  }
  assert 'train' in doors
  for path in modules():
    assert doors.isdisjoint(rooms_imported(path)), name_of(path)


def test_no_private_module_of_jax_is_used():
  for path in modules():
    if name_of(path) != 'parallel/topology':
      assert not any('jax._src' in name for name in imports(path))


@pytest.fixture(scope='module')
def loaded():
  """Modules that a fresh process holds after `import jlora`."""
  code = 'import jlora, sys; print(*sys.modules)'
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  return set(result.stdout.split())


@pytest.mark.parametrize(
  'heavy',
  [
    'bitsandbytes',
    'datasets',
    'gguf',
    'matplotlib',
    'ml_collections',
    'orbax',
    'peft',
    'tokenizers',
    'torch',
    'transformers',
  ],
)
def test_importing_jlora_loads_nothing_heavy(loaded, heavy):
  assert heavy not in loaded


def test_the_documented_names_are_there():
  import jlora

  names = (
    'LoraSpec QuantSpec QuantizedArray partition combine merge lift labels'
    ' quantize dequantize TrainState'
  )
  for name in names.split():
    assert hasattr(jlora, name), name
