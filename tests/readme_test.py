"""The README's code runs as printed."""

import pathlib
import re

import jax.numpy as jnp

README = pathlib.Path(__file__).parent.parent / 'README.md'


def blocks(language: str) -> list[str]:
  pattern = rf'^```{language}\n(.*?)^```$'
  return re.findall(pattern, README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_example_trains_a_model_that_is_not_ours():
  (example,) = blocks('python')
  names: dict = {}
  exec(compile(example, str(README), 'exec'), names)
  assert jnp.isfinite(names['loss'])
  assert set(names['trainable']) == {'Dense_0', 'Dense_1', 'Dense_2'}
  assert names['dense']['Dense_0']['kernel'].shape == (512, 128)


def test_the_files_that_commands_name_exist():
  commands = '\n'.join(blocks('sh'))
  root = README.parent
  for name in re.findall(r'--config=(\S+)', commands):
    assert (root / name).is_file()
  for module in re.findall(r'python -m (jlora\.\w+)', commands):
    assert (root / f'{module.replace(".", "/")}.py').is_file()
