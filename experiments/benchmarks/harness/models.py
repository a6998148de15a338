"""The weights that all arms read: a Hugging Face folder in float32."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.bases import DEFAULT_BASE, open_base
from jlora.checkpoints.model_folders import save_folder, stored_tensors
from jlora.checkpoints.shard_files import Entry, write_model
from jlora.checkpoints.weights import stored_shapes
from jlora.errors import ConfigError
from jlora.models import layout
from jlora.models.config import DecoderConfig
from jlora.models.hf_config import read_config, write_config

SIZES = {  # of SmolLM2-135M, which `--model=layers=60` changes one of
  'layers': 30,
  'embed': 576,
  'mlp': 1536,
  'heads': 9,
  'kv_heads': 3,
  'head_dim': 64,
  'vocab': 49152,
}
_FIELDS = {'embed': 'embed_dim', 'mlp': 'mlp_dim', 'vocab': 'vocab_size'}
_SHARD = 1 << 40  # bytes: one file


@dataclasses.dataclass(frozen=True)
class Model:
  """A model by its name or by its sizes.

  Attributes:
    name: For `open_base`, or None where the weights are random.
    config: The sizes; None until a named one is opened.
  """

  name: str | None
  config: DecoderConfig | None = None

  def write(self, folder: pathlib.Path) -> DecoderConfig:
    """Writes the weights and returns the sizes.

    Args:
      folder: Made by this.

    Raises:
      JloraError: The base cannot be found or read.
    """
    if self.name is None:
      _write_random(folder, self.config)
      return self.config
    base = open_base(self.name)
    save_folder(folder, base.config, base.load_params(), base.tokenizer)
    return base.config


def find_model(text: str | None) -> Model:
  """Returns the model that `--model` means.

  Args:
    text: None for SmolLM2-135M-Instruct; sizes such as 'layers=60,vocab=32000'
      or the path of a config.json, whose weights are then random; else a base
      as `jlora.train` takes it.

  Raises:
    ConfigError: There is no such size, or config.json is of no known family.
  """
  if text is None:
    return Model(DEFAULT_BASE)
  if text.endswith('.json'):
    path = pathlib.Path(text)
    if not path.is_file():
      raise ConfigError(f'--model={text} does not exist; name a config.json')
    return Model(None, read_config(json.loads(path.read_text())))
  if text.partition('=')[0] in SIZES or ('=' in text and '/' not in text):
    return Model(None, make_config(_sizes(text)))
  return Model(text)


def _sizes(text: str) -> dict[str, int]:
  sizes = dict(SIZES)
  for part in text.split(','):
    name, _, value = part.partition('=')
    if name not in SIZES or not value.isdecimal() or int(value) < 1:
      raise ConfigError(
        f'--model={text} has {part!r}; it takes sizes such as layers=60, of'
        f' {", ".join(SIZES)}'
      )
    sizes[name] = int(value)
  if sizes['heads'] % sizes['kv_heads']:
    raise ConfigError(
      f'--model={text}: heads is {sizes["heads"]}, which kv_heads,'
      f' {sizes["kv_heads"]}, does not divide'
    )
  return sizes


def make_config(sizes: Mapping[str, int]) -> DecoderConfig:
  """Returns a Llama of these sizes, with SmolLM2's constants.

  Args:
    sizes: As in `SIZES`.
  """
  fields = {_FIELDS.get(name, name): size for name, size in sizes.items()}
  return DecoderConfig(**fields, rope_theta=1e5, max_positions=1 << 16)


def _write_random(folder: pathlib.Path, config: DecoderConfig) -> None:
  folder.mkdir(parents=True)
  shapes = stored_shapes(config)
  dtype = np.dtype('float32')
  write_model(
    folder,
    {name: Entry(shape, dtype) for name, shape in shapes.items()},
    stored_tensors(config, _random_leaves(config)),
    largest=_SHARD,
  )
  fields = {**write_config(config), 'dtype': dtype.name}
  (folder / 'config.json').write_text(json.dumps(fields, indent=1))


def _random_leaves(config: DecoderConfig) -> Iterator[tuple[str, Any]]:
  random = np.random.default_rng(0)
  for weight in layout.weights(config):
    if weight.path.endswith('scale'):
      yield weight.path, np.ones(weight.shape, 'f4')
    else:
      values = random.standard_normal(weight.shape, 'f4')
      yield weight.path, values * np.float32(0.02)
