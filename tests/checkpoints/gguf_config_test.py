import numpy as np
import pytest

from jlora.checkpoints.architectures import ARCHITECTURES, architecture_of
from jlora.checkpoints.gguf_config import read_metadata, write_metadata
from jlora.checkpoints.gguf_layout import Layout
from jlora.errors import BaseModelError
from jlora.models.families import FAMILIES
from tests.checkpoints.gguf_writer_test import config_of

BAD = ['x', -1, 0, True, 1.5, np.array([1, 2]), ['a'], 2**40, np.nan, np.inf]
SAID = [  # rows that between them have all keys
  'llama yarn',
  'llama llama3',
  'mixtral whole',
  'gemma2 scaled by width',
  'gemma3_text scaled by width',
  'gpt2',
  'phi3 longrope',
  'qwen3_moe normalized',
]


@pytest.mark.parametrize('row', SAID)
@pytest.mark.filterwarnings('ignore:.*sliding_window:UserWarning')
def test_a_value_that_cannot_be_right_never_crashes(row):
  shapes = Layout(config_of(row)).shapes
  metadata, factors = write_metadata(config_of(row), shapes)
  keys = [key for key in metadata if not key.startswith('general')]
  keys += [f'{metadata["general.architecture"]}.rope.scaling.type']
  refused = 0
  for key in keys:
    for value in BAD:
      try:
        read_metadata('x', {**metadata, key: value}, shapes, factors)
      except BaseModelError as error:
        refused += 1
        assert str(error).startswith(('x', 'config.json'))  # noqa: PT017
  assert refused > 5 * len(keys)


def test_every_family_has_an_architecture():
  written = {family: architecture_of(family) for family in FAMILIES}
  assert set(written.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize('key', ['block_count', 'attention.head_count'])
def test_a_missing_size_is_named(key):
  shapes = Layout(config_of('llama')).shapes
  metadata, _ = write_metadata(config_of('llama'), shapes)
  del metadata[f'llama.{key}']
  with pytest.raises(BaseModelError, match=f'lacks the key llama.{key}'):
    read_metadata('x', metadata, shapes)


@pytest.mark.parametrize(
  'bad', [np.ones(2), np.array([1, 0, 2.0]), np.ones((3, 1))]
)
def test_factors_of_other_pairs_are_refused(bad):
  config = config_of('phi3 longrope')
  shapes = Layout(config).shapes
  metadata, factors = write_metadata(config, shapes)
  factors['rope_factors_long.weight'] = bad.astype('f4')
  with pytest.raises(BaseModelError, match='not 3 positive numbers'):
    read_metadata('x', metadata, shapes, factors)


@pytest.mark.parametrize('rotated', [0, 3, 10])
def test_more_features_than_a_head_has_are_not_rotated(rotated):
  config = config_of('phi3 partly rotated')
  shapes = Layout(config).shapes
  metadata, _ = write_metadata(config, shapes)
  metadata['phi3.rope.dimension_count'] = rotated
  with pytest.raises(BaseModelError, match=f'dimension_count={rotated}'):
    read_metadata('x', metadata, shapes)


def test_layers_with_a_window_may_be_listed():
  config = config_of('gemma3_text scaled by width')
  shapes = Layout(config).shapes
  metadata, _ = write_metadata(config, shapes)
  key = 'gemma3.attention.sliding_window_pattern'
  listed = {**metadata, key: np.array([False, True, True])}
  assert read_metadata('x', listed, shapes).local_layers == (1, 2)


def test_the_widest_gemma_divides_scores_by_another_width():
  config = config_of('gemma3_text all whole')
  shapes = Layout(config).shapes
  metadata, _ = write_metadata(config, shapes)
  metadata['gemma3.block_count'] = 62
  shapes = {**shapes, **{f'blk.{i}.x': (1,) for i in range(62)}}
  assert read_metadata('x', metadata, shapes).query_scalar == 32 / 4
