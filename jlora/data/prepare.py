"""From the names of sources to examples that can be trained on."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jlora.data import tasks
from jlora.data.conversations import Conversation
from jlora.data.loader import packing_efficiency
from jlora.data.mixing import Mixture, Sources
from jlora.data.parts import Part, load_parts, separate
from jlora.data.recipe import Made, Recipe
from jlora.data.report import DataReport
from jlora.data.stream_loader import StreamLoader
from jlora.data.templates import notes_on
from jlora.data.tokens import Example
from jlora.errors import DataError


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Data that is ready for a run.

  Attributes:
    train: Examples to train on.
    eval: Held-out examples.
    eval_conversations: What `eval` was made of, to be answered and scored.
    report: The counters.
    order: Which of `train` an epoch holds; or the loader that reads data as it
      goes, of which `train` is the first block.
    score: Maps (completion, conversation) to the verifier's score, 1.0 for a
      right answer; None where the held-out data has no verifier.
    is_well_formed: Maps (completion, conversation) to whether the completion
      has the form of an answer; None likewise.
  """

  train: tuple[Example, ...]
  eval: tuple[Example, ...]
  eval_conversations: tuple[Conversation, ...]
  report: DataReport
  order: Mixture | StreamLoader
  score: Callable[[str, Conversation], float] | None = None
  is_well_formed: Callable[[str, Conversation], bool] | None = None


def prepare(
  train: str | Sources,
  eval: str | None,  # noqa: A002
  recipe: Recipe,
  *,
  pack: bool = True,
  seed: int = 0,
  train_examples: int | None = None,
  eval_examples: int = 200,
  columns: Sequence[tuple[str, Any]] = (),
) -> Prepared:
  """Loads, separates, tokenizes and fits the data of a run.

  Args:
    train: Where training data comes from, see `sources.check_source`; one
      source, or pairs of a source and its weight.
    eval: Where held-out data comes from. None takes other questions of the
      same task, a folder's own valid files, or holds a seeded part of `train`
      out: `eval_examples`, but at most a tenth of it.
    recipe: How conversations become examples.
    pack: Whether examples share rows.
    seed: Which questions of a task are trained on, and which part of other
      data is held out.
    train_examples: Examples to train on; None is all of them.
    eval_examples: Examples to hold out.
    columns: Pairs of a field and the column that holds it, or of a source and
      such pairs.

  Returns:
    The data, and a report of what was decided and dropped.

  Raises:
    DataError: A source is wrong, malformed or too small, the tokenizer does
      not fit it, or too much of it is longer than a row.
  """
  if seed < 0:
    raise DataError(f'seed {seed} is negative; choose 0 or more')
  sources = [(train, None)] if isinstance(train, str) else list(train)
  parts = load_parts(
    sources,
    eval,
    seed=seed,
    train_examples=train_examples,
    eval_examples=eval_examples,
    columns=columns,
  )
  kept, duplicates = separate(parts)
  if not kept:
    raise DataError(
      f'all {duplicates} held-out examples of {eval or train!r} occur in'
      ' training; name another source in data.eval'
    )
  made = [recipe.make_all(part.trained, part.source) for part in parts]
  held_out = recipe.make_all(kept, eval or 'what is held out')
  mixture = Mixture(
    tuple(len(each.examples) for each in made),
    tuple(weight for _, weight in sources),
  )
  mixture.require_all([name for name, _ in sources])
  examples = [example for each in made for example in each.examples]
  report = count(
    examples,
    [*made, held_out],
    packing_efficiency(examples, max_length=recipe.max_length, pack=pack),
    _notes(parts, mixture, recipe),
    eval_examples=len(kept),
    duplicates=duplicates,
  )
  return Prepared(
    tuple(examples),
    tuple(held_out.examples),
    tuple(recipe.prepared(conversation)[0] for conversation in kept),
    report,
    mixture,
    *judges(kept),
  )


def count(
  examples: Sequence[Example],
  made: Sequence[Made],
  packing: float,
  notes: tuple[str, ...],
  *,
  eval_examples: int,
  duplicates: int,
) -> DataReport:
  """Returns the report on examples to train on.

  Args:
    examples: What is trained on.
    made: These and the held-out ones, with what it took.
    packing: Share of the places in rows that hold a token.
    notes: What was decided about the sources.
    eval_examples: Conversations held out.
    duplicates: Those that were passed over.
  """
  return DataReport(
    examples=len(examples),
    eval_examples=eval_examples,
    tokens=sum(map(len, examples)),
    trained_tokens=int(sum(e.loss_mask.sum() for e in examples)),
    packing_efficiency=packing,
    cut=sum(each.fit.cut for each in made),
    dropped=sum(each.fit.dropped for each in made),
    split=sum(each.fit.split for each in made),
    divided=sum(each.divided for each in made),
    thoughts=sum(each.thoughts for each in made),
    duplicates=duplicates,
    notes=notes,
  )


def _notes(
  parts: Sequence[Part], mixture: Mixture, recipe: Recipe
) -> tuple[str, ...]:
  fields = dict(recipe.template)
  return (
    *(note for part in parts for note in part.notes),
    *_mix(parts, mixture),
    *notes_on(recipe.tokenizer, fields),
  )


def _mix(parts: Sequence[Part], mixture: Mixture) -> list[str]:
  """Says what an epoch holds of each source, where there are several."""
  counts, total = mixture.counts, sum(mixture.counts)
  return [
    f'{part.source}: {count:,} of {size:,} examples an epoch,'
    f' {count / total:.1%} of it'
    for part, count, size in zip(parts, counts, mixture.sizes, strict=True)
    if len(parts) > 1
  ]


def judges(
  conversations: Sequence[Conversation],
) -> tuple[
  Callable[[str, Conversation], float] | None,
  Callable[[str, Conversation], bool] | None,
]:
  """Returns the verifier and the judge of form of a task, or two Nones.

  Args:
    conversations: What is held out.
  """
  if any(conversation.task is None for conversation in conversations):
    return None, None
  shape = tasks.shape_of(c.reference for c in conversations)
  return tasks.score_answer, lambda completion, _: shape.fits(completion)
