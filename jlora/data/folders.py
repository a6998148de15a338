"""Folders of data files, one or several for each split.

The layouts are those of mlx-lm (`train.jsonl`, `valid.jsonl`, `test.jsonl`)
and of the hub (`data/train-00000-of-00002.parquet`, `train/….csv`).
"""

import pathlib
import re

from jlora.data.files import TEXT, is_data_file
from jlora.errors import DataError

# What the splits are called, the name that is said first.
_NAMES = {
  'train': ('train', 'training'),
  'valid': ('valid', 'validation', 'val', 'dev', 'eval'),
  'test': ('test', 'testing'),
}
_ABOUT = re.compile(r'(readme|license|notice)\b.*', re.IGNORECASE)


def split_files(folder: str, split: str) -> list[str]:
  """Returns the data files of a split, sorted.

  Files belong to a split by their name, before a dash, dot or underscore, or
  by that of the folder they lie in. Where no name is that of any split, all
  of them are for training.

  Args:
    folder: A folder that exists.
    split: Such as 'train'; 'valid', 'validation', 'val' and 'dev' are one.

  Raises:
    DataError: There is none; the message lists the splits that there are.
  """
  splits = _splits(pathlib.Path(folder))
  wanted = _canonical(split) or split
  if wanted not in splits:
    known = ', '.join(f'{name} ({len(splits[name])})' for name in splits)
    raise DataError(
      f'folder {folder!r} has no files of the split {split!r}; it has'
      f' {known or "no data files"}: name one such as {split}.jsonl'
    )
  return splits[wanted]


def has_split(folder: str, split: str) -> bool:
  """Returns whether a folder has files of a split, see `split_files`."""
  return (_canonical(split) or split) in _splits(pathlib.Path(folder))


def _splits(folder: pathlib.Path) -> dict[str, list[str]]:
  """Returns the files of every split."""
  files = _data_files(folder)
  named = [(_split_of(path.relative_to(folder)), path) for path in files]
  if not any(split for split, _ in named):
    named = [('train', path) for path in files]
  splits: dict[str, list[str]] = {}
  for split, path in named:
    splits.setdefault(split or path.stem, []).append(str(path))
  return splits


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns data files; text counts only where there is nothing else."""
  found = [
    path
    for path in sorted(folder.rglob('*'))
    if is_data_file(str(path))
    and path.is_file()
    and not _ABOUT.fullmatch(path.name)
    and not any(p.startswith('.') for p in path.relative_to(folder).parts)
  ]
  rows = [path for path in found if path.suffix.lower() not in TEXT]
  return rows or found


def _split_of(path: pathlib.Path) -> str | None:
  """Returns the split that a file's name, or that of its folder, says."""
  for part in (path.name, *reversed(path.parts[:-1])):
    if split := _canonical(re.split(r'[-._]', part)[0]):
      return split
  return None


def _canonical(name: str) -> str | None:
  for split, names in _NAMES.items():
    if name.lower() in names:
      return split
  return None
