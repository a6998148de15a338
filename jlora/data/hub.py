"""Rows of datasets on the hub, through `datasets`."""

import re
from collections.abc import Iterator

from jlora.data.files import Row, without_none
from jlora.data.lines import first_line
from jlora.errors import DataError

_ID = re.compile(
  r'(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>\w+))?'
)


def is_hub_id(source: str) -> bool:
  """Returns whether a name is that of a dataset on the hub.

  Args:
    source: `owner/name`, `owner/name:SPLIT` or `owner/name:CONFIG:SPLIT`.
  """
  return _ID.fullmatch(source) is not None


def read_hub(source: str, *, stream: bool = False) -> Iterator[Row]:
  """Yields the rows of a dataset on the hub.

  Args:
    source: As in `is_hub_id`; the split is 'train' where it is not said.
    stream: Whether rows are fetched as they are needed, and not all before.

  Raises:
    DataError: It cannot be loaded.
  """
  import datasets

  found = _ID.fullmatch(source)
  name, config, split = found['name'], found['config'], found['split']
  try:
    rows = datasets.load_dataset(
      name, config, split=split or 'train', streaming=stream
    )
    for i, row in enumerate(rows):
      yield f'{source}: row {i}', without_none(row)
  except Exception as error:  # of whichever client fetches it
    raise DataError(
      f'dataset {source!r} cannot be loaded: {first_line(error)}; check its'
      ' name and split (owner/name:split, owner/name:config:split), and the'
      ' connection'
    ) from error
