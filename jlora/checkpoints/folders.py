"""What is replaced as a whole: the old one or the new, never a mix."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from jlora.errors import CheckpointError, ConfigError


@contextlib.contextmanager
def replacing(
  folder: str | os.PathLike[str],
  *,
  known: Callable[[str], bool],
) -> Iterator[pathlib.Path]:
  """Gives an empty folder that takes the place of `folder` at the end.

  It lies beside `folder`, is flushed to the disk and renamed. If the block
  raises, `folder` stays as it was. A process that was killed between the two
  renames is made up for by the next call, or by `restore_folder`.

  Args:
    folder: Created, or replaced if it holds only `known` files.
    known: Whether a file of this name may be replaced.

  Yields:
    The folder to write into.

  Raises:
    ConfigError: The folder holds other files, or is none.
    CheckpointError: The disk refused; what was there before is kept.
  """
  folder = pathlib.Path(folder).resolve()
  new, old = _beside(folder)
  try:
    restore_folder(folder)
    check_replaceable(folder, known)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    check_replaceable(folder, known)  # others may have written meanwhile
    for path in [*new.iterdir(), new]:
      _flush(path)
    if folder.exists():
      folder.rename(old)
    new.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
  except OSError as error:
    raise CheckpointError(
      f'{folder} cannot be written ({error}); what was there before is kept'
    ) from error
  finally:
    restore_folder(folder)
    shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a name for a file that takes the place of `path` at the end.

  It lies beside `path`, is flushed to the disk and renamed. If the block
  raises, `path` stays as it was.

  Args:
    path: Created or replaced.

  Yields:
    The name to write to.

  Raises:
    CheckpointError: The disk refused; what was there before is kept.
  """
  path = pathlib.Path(path).resolve()
  new = _beside(path)[0]
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield new
    _flush(new)
    new.replace(path)
    _flush(path.parent)
  except OSError as error:
    raise CheckpointError(
      f'{path} cannot be written ({error}); what was there before is kept'
    ) from error
  finally:
    new.unlink(missing_ok=True)


def restore_folder(folder: str | os.PathLike[str]) -> None:
  """Brings back what a killed `replacing` had moved aside, if it did."""
  folder = pathlib.Path(folder).resolve()
  old = _beside(folder)[1]
  if old.exists() and not folder.exists():
    old.rename(folder)


def _beside(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  names = (f'.{folder.name}.jlora-new', f'.{folder.name}.jlora-old')
  return folder.with_name(names[0]), folder.with_name(names[1])


def check_replaceable(
  folder: pathlib.Path, known: Callable[[str], bool]
) -> None:
  """Requires that a folder is new, or holds nothing but what may be replaced.

  Args:
    folder: The folder.
    known: As in `replacing`.

  Raises:
    ConfigError: It holds other files, or is none.
  """
  if not folder.exists():
    return
  if not folder.is_dir():
    raise ConfigError(f'{folder} is a file; name a new folder')
  found = sorted(path.name for path in folder.iterdir())
  if others := [name for name in found if not known(name)]:
    more = f' and {len(others) - 1} more' if len(others) > 1 else ''
    raise ConfigError(
      f'{folder} would be replaced, but holds {others[0]!r}{more}, which what'
      ' is written there does not; name a new folder'
    )


def _flush(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
