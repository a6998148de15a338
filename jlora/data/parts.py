"""The parts that data is put together from, each with what it holds out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.data.conversations import Conversation, make_text
from jlora.data.mixing import Sources, portion, shares
from jlora.data.rows import Columns, columns_of
from jlora.data.sources import held_out_source, is_task, load_conversations
from jlora.errors import DataError

_TAIL = 1 << 20  # characters at most that are held out of a single text


@dataclasses.dataclass(frozen=True)
class Part:
  """What one source gives.

  Attributes:
    source: Its name.
    trained: Conversations to train on.
    held_out: Conversations to hold out, more than are needed for a task.
    limit: How many of these to keep.
    notes: What was read and decided, a sentence each.
  """

  source: str
  trained: list[Conversation]
  held_out: list[Conversation]
  limit: int
  notes: list[str]


def load_parts(
  sources: Sources,
  eval_: str | None,
  *,
  seed: int,
  train_examples: int | None,
  eval_examples: int,
  columns: Sequence[tuple[str, Any]] = (),
) -> list[Part]:
  """Loads every source, and what is held out.

  Args:
    sources: Names and weights.
    eval_: Where held-out data comes from. None takes it from each source, by
      its share: other questions of a task, a folder's own valid files, or a
      seeded tenth of the rows.
    seed: Which questions are trained on, and which rows are held out.
    train_examples: Examples to train on; None is all of them.
    eval_examples: Examples to hold out.
    columns: As `rows.columns_of` takes them.

  Raises:
    DataError: A source is wrong, malformed or too small.
  """
  parts = [
    _load_part(
      source,
      hold_out=eval_ is None,
      seed=seed,
      train_examples=portion(train_examples, share),
      eval_examples=portion(eval_examples, share),
      columns=columns_of(source, columns),
    )
    for (source, _), share in zip(sources, shares(sources), strict=True)
  ]
  total = sum(len(part.trained) for part in parts)
  short = train_examples is not None and total < train_examples
  if short and len(parts) > 1:
    parts[-1].notes.append(
      f'{total:,} examples to train on, not data.train_examples='
      f'{train_examples:,}: some have less than their share'
    )
  if eval_ is not None:
    held, note = _load_held_out(
      eval_, eval_examples, seed, columns_of(eval_, columns)
    )
    parts[0] = dataclasses.replace(parts[0], held_out=held, limit=eval_examples)
    parts[-1].notes.append(note)
  return parts


def _load_part(
  source: str,
  *,
  hold_out: bool,
  seed: int,
  train_examples: int | None,
  eval_examples: int,
  columns: Columns,
) -> Part:
  own = held_out_source(source) if hold_out else None
  apart = is_task(source) or own is not None
  rows, note = load_conversations(
    source,
    split='train',
    examples=train_examples if apart or not hold_out else None,
    seed=seed,
    columns=columns,
  )
  if not hold_out:
    return Part(source, rows, [], 0, [note])
  if apart:
    held_out, eval_note = _load_held_out(
      own or source, eval_examples, seed, columns
    )
    return Part(source, rows, held_out, eval_examples, [note, eval_note])
  trained, held_out, said = _hold_out(source, rows, eval_examples, seed)
  notes = [note, said]
  if train_examples is not None and train_examples < len(trained):
    notes.append(
      f'data.train_examples leaves out {len(trained) - train_examples:,} of'
      f' the other {len(trained):,} rows'
    )
  return Part(source, trained[:train_examples], held_out, eval_examples, notes)


def _load_held_out(
  source: str, eval_examples: int, seed: int, columns: Columns
) -> tuple[list[Conversation], str]:
  # A task is asked for more than is needed, since some repeat themselves.
  examples = 2 * eval_examples if is_task(source) else None
  return load_conversations(
    source, split='eval', examples=examples, seed=seed, columns=columns
  )


def _hold_out(
  source: str, rows: list[Conversation], examples: int, seed: int
) -> tuple[list[Conversation], list[Conversation], str]:
  if len(rows) == 1 and rows[0].is_text:
    return _hold_out_end(rows[0])
  n = min(examples, len(rows) // 10 or 1)
  if len(rows) <= n:
    raise DataError(
      f'{source!r} has {len(rows)} row, none of which can be held out; give'
      ' two or more, or name data.eval'
    )
  order = np.argsort(np.random.Philox(key=seed).random_raw(len(rows)))
  chosen = set(order[:n].tolist())
  held_out = [row for i, row in enumerate(rows) if i in chosen]
  trained = [row for i, row in enumerate(rows) if i not in chosen]
  said = f'{len(held_out)} of {len(rows)} held out, chosen by seed {seed}'
  return trained, held_out, said


def _hold_out_end(
  text: Conversation,
) -> tuple[list[Conversation], list[Conversation], str]:
  """Holds out the end of a single text, from a line's beginning if it can."""
  whole = text.reference
  start = max(len(whole) * 9 // 10, len(whole) - _TAIL)
  start = whole.rfind('\n', start // 2 + 1, start + 1) + 1 or start
  halves = whole[:start], whole[start:]
  if not all(half.strip() for half in halves):
    raise DataError(
      f'{text.where}: a text of {len(whole)} characters is too short to hold'
      ' its end out; give more, or name data.eval'
    )
  trained, held_out = (
    dataclasses.replace(make_text(half), where=text.where) for half in halves
  )
  said = f'the last {len(halves[1]):,} of {len(whole):,} characters held out'
  return [trained], [held_out], said


def separate(parts: Sequence[Part]) -> tuple[list[Conversation], int]:
  """Returns the held-out conversations, and how many were passed over.

  Those are passed over whose prompt some part trains on; of each part up to
  its limit are kept.

  Args:
    parts: All parts of the data.
  """
  seen = {c.prompt_key() for part in parts for c in part.trained}
  kept, duplicates = [], 0
  for part in parts:
    enough = len(kept) + part.limit
    for conversation in part.held_out:
      if len(kept) == enough:
        break
      if conversation.prompt_key() in seen:
        duplicates += 1
      else:
        kept.append(conversation)
  return kept, duplicates
