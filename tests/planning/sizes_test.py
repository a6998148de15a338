"""Facts of jlora.planning.sizes."""

import json
import pathlib

import pytest

from jlora.checkpoints.bases import open_base
from jlora.errors import BaseModelError
from jlora.models.hf_config import write_config
from jlora.models.layout import weights
from jlora.planning.sizes import read_sizes

BASES = pathlib.Path(__file__).parents[2] / 'tpu' / 'bases'


def test_a_config_alone_is_enough(tmp_path, small):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(write_config(small)))
  assert read_sizes(str(path)) == read_sizes(str(tmp_path)) == small


def test_a_base_has_the_sizes_it_is_trained_with(tiny_base):
  assert read_sizes(str(tiny_base)) == open_base(str(tiny_base)).config


@pytest.mark.parametrize(
  ('name', 'parameters'),
  [
    ('llama-65b', 65_285_660_672),
    ('llama-3.1-8b', 8_030_261_248),
    ('llama-3-70b', 70_553_706_496),
    ('llama-3.1-405b', 405_853_388_800),
  ],
)
def test_the_bases_of_the_plans_have_their_published_size(name, parameters):
  config = read_sizes(str(BASES / f'{name}.json'))
  found = 0
  for weight in weights(config):
    size = 1
    for side in weight.shape:
      size *= side
    found += size
  assert found == parameters


@pytest.mark.parametrize(
  ('field', 'value'),
  [('model_type', 'mamba'), ('hidden_size', 'wide'), ('hidden_act', 'gelu')],
)
def test_what_is_no_llama_is_refused(tmp_path, small, field, value):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(write_config(small) | {field: value}))
  with pytest.raises(BaseModelError, match=field):
    read_sizes(str(path))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(BaseModelError, match=r'nothing\.json does not exist'):
    read_sizes(str(tmp_path / 'nothing.json'))
