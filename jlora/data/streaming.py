"""From the names of sources to a loader that reads them as it goes."""

from collections.abc import Sequence
from typing import Any

from jlora.data.conversations import Conversation
from jlora.data.mixing import Sources, portion, shares
from jlora.data.prepare import Prepared, count, judges
from jlora.data.recipe import Made, Recipe
from jlora.data.rows import Columns, columns_of
from jlora.data.sources import (
  folder_note,
  held_out_source,
  is_task,
  load_conversations,
)
from jlora.data.stream_loader import StreamLoader
from jlora.data.streams import SourceStream
from jlora.data.templates import notes_on


def prepare_stream(
  sources: Sources,
  eval_: str | None,
  recipe: Recipe,
  *,
  batch_size: int,
  buffer: int,
  pack: bool = True,
  seed: int = 0,
  train_examples: int | None = None,
  eval_examples: int = 200,
  columns: Sequence[tuple[str, Any]] = (),
) -> Prepared:
  """Opens the data of a run, of which only a block is in memory.

  What is held out is: rows of `eval_`, other questions of a task, a folder's
  own valid files, or else the first rows of a source. Rows with their prompts
  are not trained on.

  Args:
    sources: Names and weights; without weights all count alike.
    eval_: Where held-out data comes from; None takes it from each source.
    recipe: How conversations become examples.
    batch_size: Rows a batch.
    buffer: Examples that are shuffled and packed together.
    pack: Whether examples share rows.
    seed: Which order, and which questions of a task are trained on.
    train_examples: Rows to train on in a round, of all sources; None is all.
    eval_examples: Examples to hold out.
    columns: As `rows.columns_of` takes them.

  Returns:
    The data with its loader; `train` and the report are of the first block.

  Raises:
    DataError: A source is wrong, a row that is read is malformed, or too much
      of the first block is longer than a row.
  """
  by_share = shares(sources)
  held, skips = [], []
  notes = notes_on(recipe.tokenizer, dict(recipe.template))
  for (source, _), share in zip(sources, by_share, strict=True):
    rows, skip, note = _hold_out(
      source, eval_, portion(eval_examples, share), columns
    )
    held += rows
    skips.append(skip)
    notes.append(
      f'{source}: streamed, {share:.1%} of the examples; {note}'
      f'{folder_note(source, "train")}'
    )
  if eval_ is not None:
    held, note = _first(
      eval_, 'eval', eval_examples, columns_of(eval_, columns)
    )
    notes.append(note)
  held_out = recipe.make_all(held, eval_ or 'what is held out')
  prompts = frozenset(conversation.prompt_key() for conversation in held)
  streams = [
    SourceStream(
      source,
      recipe,
      columns=columns_of(source, columns),
      seed=seed,
      skip=skip,
      limit=portion(train_examples, share),
      held_out=prompts,
    )
    for (source, _), share, skip in zip(sources, by_share, skips, strict=True)
  ]
  loader = StreamLoader(
    streams,
    by_share,
    batch_size=batch_size,
    max_length=recipe.max_length,
    buffer=buffer,
    pack=pack,
    seed=seed,
  )
  return _prepared(loader, streams, recipe, held, held_out, notes)


def _prepared(
  loader: StreamLoader,
  streams: Sequence[SourceStream],
  recipe: Recipe,
  held: Sequence[Conversation],
  held_out: Made,
  notes: list[str],
) -> Prepared:
  """Reads the first block, and counts what it took."""
  examples = loader.first_block()
  for stream in streams:
    stream.check_seen()
  made = sum((stream.made for stream in streams), Made())
  recipe.require_kept(made, ', '.join(stream.source for stream in streams))
  notes.append(
    f'the counts are of the first {len(examples):,} examples, which are'
    ' shuffled together (data.shuffle_buffer);'
    f' {sum(stream.duplicates for stream in streams):,} rows with a prompt that'
    ' is held out are left out'
  )
  rows, filled = loader.filled()
  notes.append(
    f'{rows:.1f} of {loader.batch_size} rows a step hold examples; a larger'
    ' data.shuffle_buffer fills more of them'
  )
  notes += [stream.line() for stream in streams]
  notes += filter(None, [stream.lost() for stream in streams])
  report = count(
    examples,
    [made, held_out],
    filled,
    tuple(notes),
    eval_examples=len(held),
    duplicates=0,
  )
  return Prepared(
    tuple(examples),
    tuple(held_out.examples),
    tuple(recipe.prepared(conversation)[0] for conversation in held),
    report,
    loader,
    *judges(held),
  )


def _hold_out(
  source: str,
  eval_: str | None,
  examples: int,
  columns: Sequence[tuple[str, Any]],
) -> tuple[list[Conversation], int, str]:
  """Returns held-out rows, how many a source is to skip, and a note."""
  if eval_ is not None:
    return [], 0, 'held-out rows are another source'
  own = held_out_source(source)
  apart = own is not None or is_task(source)
  rows, note = _first(
    own or source,
    'eval' if apart else 'train',
    examples,
    columns_of(source, columns),
  )
  if apart:
    return rows, 0, note
  return rows, len(rows), f'its first {len(rows):,} rows are held out ({note})'


def _first(
  source: str, split: str, examples: int, columns: Columns
) -> tuple[list[Conversation], str]:
  return load_conversations(
    source, split=split, examples=examples, columns=columns, stream=True
  )
