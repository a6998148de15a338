"""From the names of sources to examples that can be trained on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jlora.data import tasks
from jlora.data.conversations import Conversation
from jlora.data.fitting import Fit, fit
from jlora.data.loader import packing_efficiency
from jlora.data.parts import Sources, load_parts, separate
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
    score: Maps (completion, conversation) to the verifier's score, 1.0 for a
      right answer; None where the held-out data has no verifier.
    is_well_formed: Maps (completion, conversation) to whether the completion
      has the form of an answer; None likewise.
  """

  train: tuple[Example, ...]
  eval: tuple[Example, ...]
  eval_conversations: tuple[Conversation, ...]
  report: DataReport
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
  parts = load_parts(
    [(train, None)] if isinstance(train, str) else train,
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
  trained = [c for part in parts for c in part.trained]
  (train_set, train_fit), (eval_set, eval_fit) = make(trained), make(kept)
  report = DataReport(
    examples=len(train_set),
    eval_examples=len(kept),
    tokens=sum(map(len, train_set)),
    trained_tokens=int(sum(e.loss_mask.sum() for e in train_set)),
    packing_efficiency=packing_efficiency(
      train_set, max_length=max_length, pack=pack
    ),
    cut=train_fit.cut + eval_fit.cut,
    dropped=train_fit.dropped + eval_fit.dropped,
    split=train_fit.split + eval_fit.split,
    duplicates=duplicates,
    notes=tuple(note for part in parts for note in part.notes),
  )
  score, is_well_formed = _judges(kept)
  return Prepared(
    tuple(train_set),
    tuple(eval_set),
    tuple(kept),
    report,
    score,
    is_well_formed,
  )


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
