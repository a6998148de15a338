"""Scores of what a model wrote, and its loss on held-out text."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from jlora.errors import DataError

Batch = TypeVar('Batch')


@dataclasses.dataclass(frozen=True)
class Result:
  """One completion and what its verifier says.

  Attributes:
    completion: What the model wrote.
    score: The verifier's, 1.0 for a right answer.
    well_formed: Whether it has the form that was asked for, right or wrong.
  """

  completion: str
  score: float
  well_formed: bool


@dataclasses.dataclass(frozen=True)
class Scores:
  """Results over a set of examples.

  Attributes:
    n: How many examples were scored.
    exact_match: Share of them with a score of exactly 1.
    well_formed: Share of them in the form that was asked for.
    results: One for each example, in their order.
  """

  n: int
  exact_match: float
  well_formed: float
  results: tuple[Result, ...]


@dataclasses.dataclass(frozen=True)
class Loss:
  """The loss over a set of batches.

  Attributes:
    loss: Mean over the trained tokens, in nats.
    perplexity: exp(loss).
    tokens: How many trained tokens there were.
    valid: Whether the loss is a finite number.
  """

  loss: float
  perplexity: float
  tokens: int
  valid: bool


def score_generations(
  completions: Sequence[str],
  conversations: Sequence[Any],
  score: Callable[[str, Any], float],
  is_well_formed: Callable[[str, Any], bool],
) -> Scores:
  """Scores each completion by its task's own verifier.

  Args:
    completions: What the model wrote, one text for each conversation.
    conversations: What it was asked.
    score: Maps (completion, conversation) to a score; 1.0 is right.
    is_well_formed: Whether a completion has the form that was asked for.

  Returns:
    The shares and every result.

  Raises:
    DataError: There is nothing to score, or the two numbers differ.
  """
  n = len(conversations)
  if not n or len(completions) != n:
    raise DataError(
      f'{len(completions)} completions cannot be scored against {n}'
      ' conversations; give one completion for each, and at least one'
    )
  results = tuple(
    Result(text, float(score(text, asked)), bool(is_well_formed(text, asked)))
    for text, asked in zip(completions, conversations, strict=True)
  )
  return Scores(
    n=n,
    exact_match=sum(result.score == 1.0 for result in results) / n,
    well_formed=sum(result.well_formed for result in results) / n,
    results=results,
  )


def evaluate_loss(
  loss_sums: Callable[[Batch], tuple[Any, Any]], batches: Iterable[Batch]
) -> Loss:
  """Returns the summed loss over the summed trained tokens.

  Every trained token counts the same, in whichever batch it stands. The sums
  over batches are made in float64.

  Args:
    loss_sums: Maps a batch to (summed loss in nats, trained tokens), two
      scalars.
    batches: The batches.

  Returns:
    The loss. A loss that is not finite, or no trained token at all, makes it
    invalid and raises nothing.
  """
  total, tokens = 0.0, 0
  for batch in batches:
    batch_total, batch_tokens = loss_sums(batch)
    total += float(batch_total)
    tokens += int(batch_tokens)
  loss = total / tokens if tokens else math.nan
  try:
    perplexity = math.exp(loss)
  except OverflowError:
    perplexity = math.inf
  return Loss(loss, perplexity, tokens, math.isfinite(loss))
