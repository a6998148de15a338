import pytest

from jlora.core import axes
from jlora.errors import ConfigError


def test_roles_read_stacked_input_and_output_axes():
  roles = axes.parse_roles('layers experts | embed -> heads head_dim')
  assert roles.stacked == ('layers', 'experts')
  assert roles.inputs == ('embed',)
  assert roles.outputs == ('heads', 'head_dim')


@pytest.mark.parametrize(
  'text', ['in', 'in ->', '-> out', '| in -> out', 'a -> b -> c', 'a b', '']
)
def test_malformed_roles_are_refused_with_the_form(text):
  with pytest.raises(ConfigError, match='must read'):
    axes.parse_roles(text)


def test_two_axes_need_no_entry():
  roles = axes.roles_of('up/kernel', (3, 5), ())
  assert (roles.stacked, roles.inputs, roles.outputs) == ((), ('in',), ('out',))


def test_the_first_matching_entry_wins():
  entries = (('a/.*', 'x y -> z'), ('.*', 'l | x -> z'))
  assert axes.roles_of('a/kernel', (2, 3, 4), entries).stacked == ()
  assert axes.roles_of('b/kernel', (2, 3, 4), entries).stacked == ('l',)


def test_three_axes_without_an_entry_show_the_line_to_add():
  with pytest.raises(ConfigError, match=r"axes=\(\('a/kernel', 'layers \| in"):
    axes.roles_of('a/kernel', (2, 3, 4), ())


def test_the_shown_line_is_accepted():
  with pytest.raises(ConfigError) as caught:
    axes.roles_of('a.b/kernel', (2, 3, 4, 5), ())
  line = str(caught.value).split('axes=')[1].split(' with the names')[0]
  roles = axes.roles_of('a.b/kernel', (2, 3, 4, 5), eval(line))
  assert len(roles.stacked) == 2


def test_roles_must_name_every_axis():
  with pytest.raises(ConfigError, match='name 2 axes'):
    axes.roles_of('a/kernel', (2, 3, 4), (('.*', 'in -> out'),))


def test_a_vector_is_no_kernel():
  with pytest.raises(ConfigError, match='is no kernel'):
    axes.roles_of('norm/scale', (8,), ())


def test_matrix_shape_flattens_each_side():
  roles = axes.parse_roles('layers | a b -> c d')
  assert axes.matrix_shape((7, 2, 3, 4, 5), roles) == ((7,), 6, 20)


def test_only_a_single_vocab_output_is_a_head():
  assert axes.parse_roles('embed -> vocab').is_head
  assert not axes.parse_roles('embed -> heads vocab').is_head
