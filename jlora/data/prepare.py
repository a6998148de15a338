"""From the names of two sources to examples that can be trained on."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.data import tasks
from jlora.data.conversations import Conversation
from jlora.data.fitting import Fit, fit
from jlora.data.loader import packing_efficiency
from jlora.data.report import DataReport
from jlora.data.sources import is_task, load_conversations
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
  train: str,
  eval: str | None,  # noqa: A002
  tokenizer: Tokenizer,
  *,
  max_length: int,
  pack: bool = True,
  seed: int = 0,
  train_examples: int | None = None,
  eval_examples: int = 200,
  vocab_size: int | None = None,
  max_lost: float = 0.1,
) -> Prepared:
  """Loads, separates, tokenizes and fits the data of a run.

  Args:
    train: Where training data comes from; see `sources.check_source`.
    eval: Where held-out data comes from. None takes other questions of the
      same task, or holds a seeded part of `train` out: `eval_examples`, but
      at most a tenth of it.
    tokenizer: The base's tokenizer, with its chat template.
    max_length: Tokens a row.
    pack: Whether examples share rows.
    seed: Which questions of a task are trained on, and which part of other
      data is held out.
    train_examples: Examples to train on; None is all of them.
    eval_examples: Examples to hold out.
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
  trained, held_out, notes = _load(
    train, eval, seed, train_examples, eval_examples
  )
  kept, duplicates = _drop_duplicates(trained, held_out, eval_examples)
  if not kept:
    raise DataError(
      f'all {duplicates} held-out examples of {eval or train!r} occur in'
      ' training; name another source in data.eval'
    )
  make = functools.partial(
    _examples, tokenizer, max_length, max_lost, vocab_size
  )
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
    notes=tuple(notes),
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


def _load(
  train: str,
  eval_: str | None,
  seed: int,
  train_examples: int | None,
  eval_examples: int,
) -> tuple[list[Conversation], list[Conversation], list[str]]:
  """Returns conversations to train on and to hold out, and notes."""
  if eval_ is None and not is_task(train):
    rows, note = load_conversations(
      train, split='train', examples=None, seed=seed
    )
    trained, held_out = _hold_out(train, rows, eval_examples, seed)
    said = f'{len(held_out)} of {len(rows)} held out, chosen by seed {seed}'
    notes = [note, said]
    if train_examples is not None and train_examples < len(trained):
      notes.append(
        f'data.train_examples leaves out {len(trained) - train_examples:,} of'
        f' the other {len(trained):,} rows'
      )
    return trained[:train_examples], held_out, notes
  rows, note = load_conversations(
    train, split='train', examples=train_examples, seed=seed
  )
  source = eval_ or train
  # A task is asked for more than is needed, since some repeat themselves.
  drawn = 2 * eval_examples if is_task(source) else None
  held_out, eval_note = load_conversations(
    source, split='eval', examples=drawn, seed=seed
  )
  return rows, held_out, [note, eval_note]


def _hold_out(
  source: str, rows: list[Conversation], examples: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
  n = min(examples, len(rows) // 10 or 1)
  if len(rows) <= n:
    raise DataError(
      f'{source!r} has {len(rows)} row, none of which can be held out; give'
      ' two or more, or name data.eval'
    )
  order = np.argsort(np.random.Philox(key=seed).random_raw(len(rows)))
  chosen = set(order[:n].tolist())
  held_out = [row for i, row in enumerate(rows) if i in chosen]
  return [row for i, row in enumerate(rows) if i not in chosen], held_out


def _drop_duplicates(
  trained: Sequence[Conversation],
  held_out: Iterable[Conversation],
  limit: int,
) -> tuple[list[Conversation], int]:
  """Returns up to `limit` held-out ones, and how many were passed over.

  Passed over are those whose prompt training has too.
  """
  seen = {_prompt(conversation) for conversation in trained}
  kept, duplicates = [], 0
  for conversation in held_out:
    if len(kept) == limit:
      break
    if _prompt(conversation) in seen:
      duplicates += 1
    else:
      kept.append(conversation)
  return kept, duplicates


def _prompt(conversation: Conversation) -> tuple[tuple[str, str], ...]:
  return tuple((m.role, m.content.strip()) for m in conversation.prompt)


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
  if conversations[0].task is None:
    return None, None
  shape = tasks.shape_of(c.reference for c in conversations)
  return tasks.score_answer, lambda completion, _: shape.fits(completion)
