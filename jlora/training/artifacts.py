"""What a run writes into its folder beside checkpoints and metrics."""

import collections
import dataclasses
import importlib.metadata
import platform
import resource
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jlora.checkpoints.model_folders import save_folder
from jlora.checkpoints.peft import save_adapter
from jlora.checkpoints.run_folder import MetricsFile, RunFolder
from jlora.core.combination import merge
from jlora.core.tree import leaves_by_path
from jlora.parallel import processes
from jlora.training import report
from jlora.training.evaluation import prompted
from jlora.training.job import Job
from jlora.training.progress import Progress
from jlora.version import __version__

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def save_trained(
  job: Job, folder: RunFolder, name: str, trainable: Any, step: int
) -> None:
  """Writes what was trained: an adapter, or a whole model where all was.

  Args:
    job: The run.
    folder: The run's folder.
    name: Of the folder within it, such as 'adapter' or 'best'.
    trainable: The trained half of the parameters.
    step: Updates that made it.
  """
  spec, sha256 = job.spec, job.base.sha256
  if not spec.is_adapter:
    _save_model(job, folder, name, trainable)
    return
  trainable = jax.tree.map(processes.whole, trainable)
  if not folder.writes:
    return
  save_adapter(
    folder.path(name),
    trainable,
    spec.lora,
    job.base.config,
    base_name=spec.base,
    metadata={
      'base_sha256': sha256,
      'data_digest': job.digest,
      'quantization': quantization(job),
      'step': step,
    },
    starts=job.starts,
  )


def _save_model(job: Job, folder: RunFolder, name: str, trainable: Any) -> None:
  """Writes the whole model; its leaves come to the first process in turn."""
  dense = leaves_by_path(merge(job.frozen, trainable, job.spec.lora))
  leaves = ((path, processes.whole(leaf)) for path, leaf in dense.items())
  if not folder.writes:
    collections.deque(leaves, maxlen=0)  # takes part in each
    return
  save_folder(
    folder.path(name),
    job.base.config,
    leaves,
    job.base.tokenizer,
    eos_token_ids=job.base.eos_token_ids,
  )


def quantization(job: Job) -> dict[str, Any] | None:
  """Returns the fields of the run's QuantSpec; None for a dense base."""
  return job.spec.quant and dataclasses.asdict(job.spec.quant)


def write_samples(
  job: Job,
  folder: RunFolder,
  before: Sequence[str],
  after: Sequence[str] | None = None,
) -> None:
  """Writes samples.md: fixed prompts, answered before and after training.

  Args:
    job: The run.
    folder: The run's folder.
    before: The base's answers.
    after: The tuned model's; None while training.
  """
  shown = prompted(job)[: job.spec.eval.samples]
  text = report.samples_markdown(
    [conversation.messages[-2].content for conversation in shown],
    [conversation.reference for conversation in shown],
    before,
    after,
  )
  folder.write('samples.md', text)


def write_summary(
  job: Job,
  folder: RunFolder,
  progress: Progress,
  metrics: MetricsFile,
  after: Mapping[str, float],
) -> float | None:
  """Writes loss.png, then summary.json, which says that the run is complete.

  Args:
    job: The run.
    folder: The run's folder.
    progress: Where it ended.
    metrics: Its metrics.
    after: Scores of the tuned model.

  Returns:
    Tokens a second, the median of all steps, padding left out; None where the
    process does not write.
  """
  if not folder.writes:
    return None
  lines = metrics.read()
  speed = _median(lines, 'tokens_per_s')
  fields = {
    'base': job.base.name,
    'base_model': progress.before,
    'base_sha256': job.base.sha256,
    'best_eval_loss': progress.best_loss,
    'bytes': job.footprint.bytes,
    'compiled_peak_bytes': job.footprint.compiled_peak,
    'data': dataclasses.asdict(job.data.report),
    'data_digest': job.digest,
    'flops': job.work.fields(speed),
    'frozen_params': job.footprint.frozen_params,
    'lost_metrics': metrics.lost,
    'process_peak_bytes': process_peak(),
    'quantization': quantization(job),
    'skipped_updates': progress.skipped,
    'step_seconds': _median(lines, 'step_seconds'),
    'steps': progress.step,
    'tokens_per_s': speed,
    'trainable_params': job.footprint.trainable_params,
    'trained_tokens': progress.trained_tokens,
    'tuned_model': after,
    'versions': versions(),
  }
  try:
    report.draw_losses(lines, folder.path('loss.png'))
  except OSError as error:
    warnings.warn(f'loss.png could not be drawn: {error}', stacklevel=2)
  folder.write('summary.json', report.to_json(fields))
  return speed


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
  """Returns the median of a field over the lines that have it."""
  found = [x[name] for x in lines if name in x]
  return statistics.median(found) if found else None


def process_peak() -> int:
  """Returns the largest resident size of this process so far, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def versions() -> dict[str, str]:
  """Returns the versions that a run's numbers depend on."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  found['jlora'] = __version__
  found['python'] = platform.python_version()
  found['backend'] = jax.default_backend()
  return found
