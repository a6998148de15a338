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
_SAID = 5  # names of files in a sentence
_ABOUT = re.compile(r'(readme|license|notice)\b.*', re.IGNORECASE)


def split_files(folder: str, split: str) -> list[str]:
  """Returns the data files of a split, sorted.

  Files belong to a split by a word of their name, words ending at a dash, dot
  or underscore, or by that of the folder they lie in. Where no name is that of
  any split, all of them are for training.

  Args:
    folder: A folder that exists.
    split: Such as 'train'; 'valid', 'validation', 'val' and 'dev' are one.

  Raises:
    DataError: There is none, and the message lists the splits that there are;
      or two of them differ in their suffix only.
  """
  splits = _splits(pathlib.Path(folder))
  wanted = _canonical(split) or split
  if wanted not in splits:
    known = ', '.join(f'{name} ({len(splits[name])})' for name in splits)
    raise DataError(
      f'folder {folder!r} has no files of the split {split!r}; it has'
      f' {known or "no data files"}: name one such as {split}.jsonl'
    )
  _check_suffixes(splits[wanted])
  return splits[wanted]


def _check_suffixes(paths: list[str]) -> None:
  """Refuses files that look like one, written twice."""
  seen: dict[pathlib.PurePath, str] = {}
  for path in paths:
    other = seen.setdefault(pathlib.PurePath(path).with_suffix(''), path)
    if other != path:
      raise DataError(
        f'{other!r} and {path!r} differ in their suffix only, and both would'
        ' be read; move one of them away, or name the file'
      )


def split_note(folder: str, split: str) -> str:
  """Says which files of a folder are those of a split, and which are not.

  Args:
    folder: A folder that exists.
    split: One that it has.
  """
  root = pathlib.Path(folder)
  chosen = [pathlib.Path(path) for path in split_files(folder, split)]
  others = [path for path in _found(root) if path not in chosen]
  said = f'the files of {split!r} are {_names(chosen, root)}'
  return f'{said}; left out: {_names(others, root)}' if others else said


def _names(paths: list[pathlib.Path], root: pathlib.Path) -> str:
  names = [path.relative_to(root).as_posix() for path in paths]
  more = f' and {len(names) - _SAID:,} more' if len(names) > _SAID else ''
  return ', '.join(names[:_SAID]) + more


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
  found = _found(folder)
  rows = [path for path in found if path.suffix.lower() not in TEXT]
  return rows or found


def _found(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns all files that could be read, sorted."""
  return [
    path
    for path in sorted(folder.rglob('*'))
    if is_data_file(str(path))
    and path.is_file()
    and not _ABOUT.fullmatch(path.name)
    and not any(p.startswith('.') for p in path.relative_to(folder).parts)
  ]


def _split_of(path: pathlib.Path) -> str | None:
  """Returns the split that a file's name, or that of its folder, says."""
  for part in (path.name, *reversed(path.parts[:-1])):
    for word in re.split(r'[-._ ]', part):
      if split := _canonical(word):
        return split
  return None


def _canonical(name: str) -> str | None:
  for split, names in _NAMES.items():
    if name.lower() in names:
      return split
  return None
