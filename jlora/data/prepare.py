"""From the names of sources to examples that can be trained on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jlora.data import tasks
from jlora.data.conversations import Conversation
from jlora.data.fitting import Fit, fit
from jlora.data.loader import packing_efficiency
from jlora.data.mixing import Mixture, Sources
from jlora.data.parts import Part, load_parts, separate
from jlora.data.report import DataReport
from jlora.data.tokens import Example, tokenize
from jlora.errors import DataError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast as Tokenizer
else:
  Tokenizer = Any


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Data that is ready for a run.

  Attributes:
    train: Examples to train on.
    eval: Held-out examples.
    eval_conversations: What `eval` was made of, to be answered and scored.
    report: The counters.
    mixture: Which of `train` an epoch holds.
    score: Maps (completion, conversation) to the verifier's score, 1.0 for a
      right answer; None where the held-out data has no verifier.
    is_well_formed: Maps (completion, conversation) to whether the completion
      has the form of an answer; None likewise.
  """

  train: tuple[Example, ...]
  eval: tuple[Example, ...]
  eval_conversations: tuple[Conversation, ...]
  report: DataReport
  mixture: Mixture
  score: Callable[[str, Conversation], float] | None = None
  is_well_formed: Callable[[str, Conversation], bool] | None = None


def prepare(
  train: str | Sources,
  eval: str | None,  # noqa: A002
  tokenizer: Tokenizer,
  *,
  max_length: int,
  pack: bool = True,
  seed: int = 0,
  train_examples: int | None = None,
  eval_examples: int = 200,
  columns: Sequence[tuple[str, Any]] = (),
  vocab_size: int | None = None,
  max_lost: float = 0.1,
) -> Prepared:
  """Loads, separates, tokenizes and fits the data of a run.

  Args:
    train: Where training data comes from, see `sources.check_source`; one
      source, or pairs of a source and its weight.
    eval: Where held-out data comes from. None takes other questions of the
      same task, a folder's own valid files, or holds a seeded part of `train`
      out: `eval_examples`, but at most a tenth of it.
    tokenizer: The base's tokenizer, with its chat template.
    max_length: Tokens a row.
    pack: Whether examples share rows.
    seed: Which questions of a task are trained on, and which part of other
      data is held out.
    train_examples: Examples to train on; None is all of them.
    eval_examples: Examples to hold out.
    columns: Pairs of a field and the column that holds it, or of a source and
      such pairs.
    vocab_size: Rows of the base's embedding; None does not check ids.
    max_lost: The largest share of examples that may lose tokens to
      `max_length`.

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
  make = functools.partial(
    _examples, tokenizer, max_length, max_lost, vocab_size
  )
  made = [make(part.trained) for part in parts]
  eval_set, eval_fit = make(kept)
  train_set = [example for examples, _ in made for example in examples]
  fits = [eval_fit, *(part_fit for _, part_fit in made)]
  sizes = tuple(len(examples) for examples, _ in made)
  mixture = Mixture(sizes, tuple(weight for _, weight in sources))
  mixture.require_all([name for name, _ in sources])
  report = DataReport(
    examples=len(train_set),
    eval_examples=len(kept),
    tokens=sum(map(len, train_set)),
    trained_tokens=int(sum(e.loss_mask.sum() for e in train_set)),
    packing_efficiency=packing_efficiency(
      train_set, max_length=max_length, pack=pack
    ),
    cut=sum(each.cut for each in fits),
    dropped=sum(each.dropped for each in fits),
    split=sum(each.split for each in fits),
    duplicates=duplicates,
    notes=(*(n for part in parts for n in part.notes), *_mix(parts, mixture)),
  )
  return Prepared(
    tuple(train_set),
    tuple(eval_set),
    tuple(kept),
    report,
    mixture,
    *_judges(kept),
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


def _examples(
  tokenizer: Tokenizer,
  max_length: int,
  max_lost: float,
  vocab_size: int | None,
  conversations: Sequence[Conversation],
) -> tuple[list[Example], Fit]:
  examples = [
    tokenize(conversation, tokenizer, vocab_size=vocab_size)
    for conversation in conversations
  ]
  is_text = [conversation.is_text for conversation in conversations]
  return fit(examples, is_text, max_length=max_length, max_lost=max_lost)


def _judges(
  conversations: Sequence[Conversation],
) -> tuple[
  Callable[[str, Conversation], float] | None,
  Callable[[str, Conversation], bool] | None,
]:
  """Returns the verifier and the judge of form of a task, or two Nones."""
  if any(conversation.task is None for conversation in conversations):
    return None, None
  shape = tasks.shape_of(c.reference for c in conversations)
  return tasks.score_answer, lambda completion, _: shape.fits(completion)
