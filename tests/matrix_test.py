import pathlib

from jlora.models.families import FAMILIES
from tests import matrix

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def test_the_table_of_the_readme_is_that_of_the_tests():
  table = README.split(matrix.START)[1].split(matrix.END)[0]
  assert table == matrix.make_table()


def test_every_family_has_a_row():
  assert matrix.FAMILIES.keys() == FAMILIES.keys()
