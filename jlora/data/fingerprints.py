"""Whether the files of a source are those that a run began with."""

import hashlib
import os
from collections.abc import Sequence

from jlora.data.sources import files_of

_WHOLE = 64 << 20  # bytes; of a larger file, only both ends are read
_END = 1 << 20


def with_sources(digest: str, sources: Sequence[str]) -> str:
  """Returns a digest of data of which only the beginning was read.

  Files count by their size and their bytes; of those above 64 MiB, by the
  first and the last MiB. Datasets of the hub and tasks do not count.

  Args:
    digest: Of what was read.
    sources: Names, as in `sources.check_source`.

  Returns:
    A sha256 in hexadecimal.

  Raises:
    DataError: A folder has no files to train on.
  """
  sha = hashlib.sha256(digest.encode())
  for source in sources:
    for path in files_of(source, 'train'):
      sha.update(_digest_of(path))
  return sha.hexdigest()


def _digest_of(path: str) -> bytes:
  size = os.path.getsize(path)
  sha = hashlib.sha256(size.to_bytes(8, 'little'))
  with open(path, 'rb') as file:
    if size <= _WHOLE:
      sha.update(file.read())
    else:
      sha.update(file.read(_END))
      file.seek(size - _END)
      sha.update(file.read())
  return sha.digest()
