"""Batches of conversations in files: packed into rows, and padded.

Both hold the same kind of examples, as jlora tokenizes them. A padded batch has
one example a row and is as long as its longest; it has as many examples as a
packed one on average, so a step of either learns as much.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

Fields = dict[str, np.ndarray]
_FILE = '{}.npz'


def read(folder: pathlib.Path, kind: str) -> list[Fields]:
  """Returns the fields of each batch.

  Args:
    folder: That `write` was given.
    kind: 'packed' or 'padded'.
  """
  found: dict[int, Fields] = {}
  with np.load(folder / _FILE.format(kind)) as file:
    for name in file.files:
      step, field = name.split('/')
      found.setdefault(int(step), {})[field] = file[name]
  return [found[step] for step in sorted(found)]


def write(folder: pathlib.Path, spec: Any, steps: int) -> dict[str, Any]:
  """Writes the batches of so many steps.

  Args:
    folder: Of the base, with its tokenizer.
    spec: The RunSpec, whose data are used.
    steps: How many.

  Returns:
    What the data are like: the examples of a padded batch, and tokens of an
    example, on average and at most.

  Raises:
    DataError: There are too few examples, or none.
  """
  from jlora.checkpoints.bases import open_base
  from jlora.training.job import load_data, make_loader

  data = load_data(spec, open_base(str(folder)))
  loader = make_loader(spec, data)
  packed = [loader.batch(step) for step in range(steps)]
  examples = sum(int(b.segment_ids.max(axis=1).sum()) for b in packed)
  rows = math.ceil(examples / steps)
  _write(folder, 'packed', packed)
  _write(folder, 'padded', _padded(data.train, rows, steps))
  lengths = [example.places for example in data.train]
  return {
    'conversations a step': rows,
    'mean length': round(sum(lengths) / len(lengths)),
    'longest': max(lengths),
  }


def _padded(examples: Any, rows: int, steps: int) -> list[Any]:
  """Returns batches of examples in a random order."""
  from jlora.data.packing import make_batch

  order = np.random.default_rng(0).permutation(len(examples))
  batches = []
  for chosen in np.resize(order, (steps, rows)):
    parts = [[examples[i]] for i in chosen]
    longest = max(part[0].places for part in parts)
    batches.append(make_batch(parts, batch_size=rows, max_length=longest))
  return batches


def _write(folder: pathlib.Path, kind: str, batches: list[Any]) -> None:
  arrays = {
    f'{step}/{field.name}': getattr(batch, field.name)
    for step, batch in enumerate(batches)
    for field in dataclasses.fields(batch)
  }
  np.savez(folder / _FILE.format(kind), **arrays)
