"""The held-out loss, and answers to held-out prompts."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jlora.checkpoints.adapters import check_fingerprint
from jlora.checkpoints.bases import open_base
from jlora.checkpoints.peft import load_adapter, split_initial
from jlora.core.combination import combine
from jlora.core.partition import partition
from jlora.data.conversations import Conversation
from jlora.data.tokens import prompt_tokens
from jlora.inference.plain import make_plain
from jlora.inference.sampler import generate
from jlora.inference.sampling import Sampling
from jlora.inference.scorer import (
  Loss,
  Scores,
  evaluate_loss,
  score_generations,
)
from jlora.training.job import Job


@dataclasses.dataclass(frozen=True)
class Answers:
  """What the model answered to held-out prompts.

  Attributes:
    texts: One answer a prompt.
    scores: By the task's verifier; None where it has none.
  """

  texts: list[str]
  scores: Scores | None

  def fields(self) -> dict[str, float]:
    """Returns the scores as fields of metrics.jsonl."""
    if self.scores is None:
      return {}
    return {
      'exact_match': self.scores.exact_match,
      'well_formed': self.scores.well_formed,
      'scored': self.scores.n,
    }


def held_out_loss(job: Job, trainable: Any) -> Loss:
  """Returns the loss over all held-out examples.

  Args:
    job: The run.
    trainable: The trained half of the parameters.
  """
  return evaluate_loss(
    lambda batch: job.evaluate(trainable, job.frozen, job.place(batch)),
    job.held_out,
  )


def answer(job: Job, trainable: Any) -> Answers:
  """Answers the first held-out prompts, greedily, and scores the answers.

  Args:
    job: The run.
    trainable: The trained half of the parameters.
  """
  spec = job.spec.eval
  scored = bool(job.data.score and spec.examples)
  count = max(spec.examples, spec.samples) if scored else spec.samples
  asked = prompted(job)[:count]
  tokenizer = job.base.tokenizer
  prompts = [prompt_tokens(conversation, tokenizer) for conversation in asked]
  texts = complete(job, trainable, prompts)
  if not scored:
    return Answers(texts, None)
  scores = score_generations(
    texts[: spec.examples],
    asked[: spec.examples],
    job.data.score,
    job.data.is_well_formed,
  )
  return Answers(texts, scores)


def prompted(job: Job) -> list[Conversation]:
  """Returns the held-out conversations that have a prompt to answer."""
  return [c for c in job.data.eval_conversations if not c.is_text]


def complete(
  job: Job, trainable: Any, prompts: Sequence[np.ndarray]
) -> list[str]:
  """Returns the greedy continuation of each prompt as text.

  With `eval.merge`, from plain arrays that are there for these prompts only.

  Args:
    job: The run.
    trainable: The trained half of the parameters.
    prompts: Token ids [length] each.
  """
  spec = job.spec.eval
  params = combine(job.frozen, trainable, job.spec.lora)
  if spec.merge:
    params = make_plain(params, job.dtype, job.shardings.of_plain)
  outputs = generate(
    job.apply,
    params,
    job.base.config,
    prompts,
    Sampling(max_new_tokens=spec.max_new_tokens),
    eos_token_ids=job.base.eos_token_ids,
    batch_size=spec.batch_size,
    dtype=job.dtype,
  )
  decode = job.base.tokenizer.decode
  return [decode(tokens, skip_special_tokens=True) for tokens in outputs]


def load_trained(job: Job, result: pathlib.Path) -> Any:
  """Returns the trained half of the parameters as a run wrote it.

  Args:
    job: The run.
    result: Its `adapter` folder, or `model` where everything was trained.

  Raises:
    AdapterError: The adapter is damaged or belongs to another base.
  """
  if job.spec.is_adapter:
    adapter = load_adapter(result, job.base.config)
    check_fingerprint(adapter.metadata, job.base.sha256)
    if job.spec.lora.changes_base:
      return split_initial(adapter, job.base.config)[0]
    return adapter.trainable
  params = open_base(str(result)).load_params()
  _, trainable = partition(jax.random.key(0), params, job.spec.lora)
  return trainable


def evaluate_both(job: Job, trainable: Any) -> dict[str, dict[str, float]]:
  """Returns the scores of the base and of the tuned model.

  Args:
    job: The run; its state is the base.
    trainable: The trained half of the parameters.
  """
  halves = {'base': job.state.trainable, 'tuned': trainable}
  scores = {}
  for name, half in halves.items():
    loss = held_out_loss(job, half)
    scores[name] = {
      'eval_loss': loss.loss,
      'perplexity': loss.perplexity,
      'tokens': loss.tokens,
      **answer(job, half).fields(),
    }
  return scores


def sentence(scores: dict[str, float]) -> str:
  """Returns the scores of a model for people to read.

  Args:
    scores: `eval_loss` and, where there is a verifier, the fields of `Answers`.
  """
  text = f'held-out loss {scores["eval_loss"]:.4f}'
  if 'exact_match' in scores:
    text += (
      f', exact match {scores["exact_match"]:.1%} and well-formed answers'
      f' {scores["well_formed"]:.1%} of {scores["scored"]}'
    )
  return text
