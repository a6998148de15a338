"""The sizes of a base, read without its weights."""

import pathlib
from typing import Any

from jlora.checkpoints.bases import check_base, open_base
from jlora.checkpoints.bitsandbytes import without_quantization
from jlora.checkpoints.downloads import fetch_hub
from jlora.checkpoints.shards import load_json
from jlora.checkpoints.weights import check_sizes
from jlora.errors import BaseModelError
from jlora.models.config import DecoderConfig
from jlora.models.hf_config import read_config

_MOST = 1 << 20  # layers, where no file of tensors limits them


def read_sizes(name: str) -> DecoderConfig:
  """Returns the sizes of a base.

  Args:
    name: A config.json, a folder that holds one, or what `open_base` takes.

  Raises:
    BaseModelError: It is missing, or of a family that is not supported.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    path = path / 'config.json'
  if path.suffix == '.json':
    return _from_file(path)
  check_base(name)
  if name.startswith('pypi:') or path.is_file():
    return open_base(name).config
  return _from_file(fetch_hub(name, ['config.json']) / 'config.json')


def _from_file(path: pathlib.Path) -> DecoderConfig:
  if not path.is_file():
    raise BaseModelError(
      f'{path} does not exist; name a config.json, a folder that holds one, or'
      ' a base as for training'
    )
  fields: dict[str, Any] = load_json(path)
  check_sizes(path, fields, _MOST)
  return read_config(without_quantization(path, fields))
