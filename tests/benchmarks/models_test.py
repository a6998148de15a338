"""Models by name and by sizes, and flags that cannot be right."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks.harness import models
from jlora.checkpoints.bases import DEFAULT_BASE, open_base
from jlora.errors import ConfigError
from jlora.models.hf_config import write_config

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / 'experiments' / 'benchmarks'


def test_without_a_name_it_is_the_base_of_the_experiments():
  assert models.find_model(None) == models.Model(DEFAULT_BASE)


def test_other_names_are_bases():
  for name in ('owner/name', './folder', 'pypi:a==1/b.gguf#sha256=0'):
    assert models.find_model(name) == models.Model(name)


def test_sizes_change_those_of_the_base():
  config = models.find_model('layers=60,vocab=320').config
  assert (config.layers, config.vocab_size) == (60, 320)
  assert (config.embed_dim, config.mlp_dim, config.heads) == (576, 1536, 9)


def test_a_config_json_gives_sizes(tmp_path):
  config = models.make_config({**models.SIZES, 'layers': 2})
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(write_config(config)))
  assert models.find_model(str(path)).config.layers == 2


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('depth=3', "has 'depth=3'; it takes sizes such as layers=60"),
    ('layers=3,vocab=0', "has 'vocab=0'"),
    ('layers=x', "has 'layers=x'"),
    ('layers=2,heads=4', 'heads is 4, which kv_heads, 3, does not divide'),
    ('no/config.json', 'does not exist; name a config.json'),
  ],
)
def test_sizes_that_cannot_be_right_are_refused(text, said):
  with pytest.raises(ConfigError, match=said):
    models.find_model(text)


def test_random_weights_are_a_base_that_opens(tmp_path):
  text = 'layers=1,embed=64,mlp=64,heads=2,kv_heads=1,head_dim=32,vocab=50'
  config = models.find_model(text).write(tmp_path / 'model')
  params = open_base(str(tmp_path / 'model')).load_params()
  assert params['embed']['embedding'].shape == (50, 64)
  assert params['layers']['mlp']['up_proj']['kernel'].std() < 0.03
  assert config.layers == 1


@pytest.mark.parametrize(
  ('file', 'flag', 'said'),
  [
    ('train_step.py', '--rounds=0', '--rounds is 0; it must be 1 or more'),
    ('end_to_end.py', '--length=1', '--length is 1; it must be 2 or more'),
    (
      'train_step.py',
      '--peer=pet',
      'should be one of <lora|bare|peft|qwix|lora:none|',
    ),
  ],
)
def test_a_flag_that_cannot_be_right_is_refused_in_a_sentence(file, flag, said):
  ended = subprocess.run(
    [sys.executable, FOLDER / file, flag],
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  )
  assert ended.returncode == 2
  assert said in ended.stderr
  assert len(ended.stderr.splitlines()) == 1
