"""A run's own rules for where parameters lie."""

import jax
import pytest

from jlora.config import default_config, from_json, resolve
from jlora.errors import ConfigError
from jlora.models import layout
from jlora.parallel.mesh import make_mesh
from jlora.training.halves import shardings_of
from jlora.training.run_spec import MeshSpec

UP = r'layers/mlp/up_proj/kernel'


def make_spec(rules):
  config = default_config()
  config.update(data={'train': 'unused.jsonl'}, train={'steps': 1})
  config.mesh.rules = rules
  return resolve(config)


@pytest.mark.parametrize(
  'rules',
  [
    "{'layers/mlp/.*/kernel': [None, ['fsdp', 'tensor'], None]}",
    {'layers/mlp/.*/kernel': (None, ['fsdp', 'tensor'], None)},
    [('layers/mlp/.*/kernel', [None, ('fsdp', 'tensor'), None])],
  ],
)
def test_rules_are_read_from_the_command_line_and_from_python(rules):
  assert make_spec(rules).mesh.rules == (
    ('layers/mlp/.*/kernel', (None, ('fsdp', 'tensor'), None)),
  )


def test_a_run_s_own_rules_come_before_the_family_s(sizes):
  spec = make_spec({UP: ['fsdp', None, None]})
  mesh = jax.sharding.AbstractMesh((1, 2, 1), ('data', 'fsdp', 'tensor'))
  frozen = layout.shapes(sizes['tiny'])
  placements = shardings_of(spec, frozen, mesh).placements
  assert placements[UP].cuts == (('fsdp',), (), ())
  down = placements['layers/mlp/down_proj/kernel']
  assert down.cuts == ((), ('fsdp',), ())


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ({'layers/mpl/.*': [None]}, "'layers/mpl/.*' matches"),
    ({UP: ['fsdp']}, r"\('fsdp',\) is for 1 axes"),
    ({UP: [None, None, 'model']}, "names 'model', and the mesh has data, fsdp"),
  ],
)
def test_a_rule_that_cannot_be_followed_is_refused(rules, message, sizes):
  spec = make_spec(rules)
  mesh = make_mesh(devices=jax.devices()[:1])
  with pytest.raises(ConfigError, match=message):
    shardings_of(spec, layout.shapes(sizes['tiny']), mesh)


def test_a_rule_without_axes_is_refused():
  with pytest.raises(ConfigError, match=r"mesh.rules gives 'fsdp' for a leaf"):
    MeshSpec(rules={UP: 'fsdp'})


def test_a_run_s_rules_survive_its_config_file():
  spec = make_spec({UP: [None, ['fsdp'], None]})
  assert from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
  'names', [(None, 'fsdp', 'fsdp'), ('tensor', ('fsdp', 'tensor')), (5, None)]
)
def test_a_rule_with_an_axis_twice_or_no_axis_is_refused(names):
  with pytest.raises(ConfigError, match='no mesh axis comes twice'):
    MeshSpec(rules={UP: names})
