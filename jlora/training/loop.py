"""The loop of a run. Its stages, in order:

1. claim the run folder, and check the config against a run that is there
2. load base and data, split the parameters, compile the step
3. restore the newest checkpoint, or answer held-out prompts with the base
4. train: step, log, evaluate, checkpoint; stop on a signal
5. answer the same prompts again and write adapter, samples, curves, summary
"""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
from rich.console import Console

from jlora.checkpoints.run_folder import MetricsFile, RunFolder
from jlora.checkpoints.runs import RunCheckpoints
from jlora.core.state import TrainState
from jlora.errors import CheckpointError, NonFiniteError
from jlora.parallel.devices import warn_of_idle_gpu
from jlora.training import artifacts, evaluation
from jlora.training.console import Ticker, show_table
from jlora.training.job import Job, build
from jlora.training.run_spec import RunSpec
from jlora.training.signals import StopRequest


@dataclasses.dataclass
class Progress:
  """Where a run stands: everything that a checkpoint brings back.

  Attributes:
    state: Trainable parameters, optimizer state and step.
    before: Scores of the base on held-out data.
    texts: Its answers, as many as samples.md shows.
    best_loss: Lowest held-out loss so far.
    skipped: Updates in a row that were not finite.
  """

  state: TrainState
  before: dict[str, float]
  texts: list[str]
  best_loss: float
  skipped: int = 0

  @property
  def step(self) -> int:
    """Updates so far."""
    return int(self.state.step)

  def record(self, job: Job) -> dict[str, Any]:
    """Returns what a checkpoint holds beside the state."""
    return {
      'before': self.before,
      'best_loss': self.best_loss,
      'data_digest': job.digest,
      'skipped': self.skipped,
      'texts': self.texts,
    }


def train(
  spec: RunSpec, workdir: os.PathLike[str] | str, console: Console
) -> bool:
  """Runs a run to its end, or continues one.

  Args:
    spec: The resolved config.
    workdir: The run's folder.
    console: Where progress is shown.

  Returns:
    Whether the run ended; False where a signal stopped it after a checkpoint.

  Raises:
    JloraError: The input is wrong, or the run stopped to protect data.
  """
  warn_of_idle_gpu()
  folder = RunFolder(workdir)
  checkpoints = RunCheckpoints(folder.path('checkpoints'))
  try:
    if checkpoints.steps():
      for change in folder.check_config(spec.to_json()):
        console.print(f'continuing with another {change}')
    job = build(spec, console)
    show_table(console, 'one training step', job.footprint.rows())
    folder.write('config.json', spec.to_json())
    progress, metrics = _start(job, folder, checkpoints, console)
    if not _advance(job, folder, checkpoints, progress, metrics, console):
      return False
    _finish(job, folder, progress, metrics, console)
    return True
  finally:
    checkpoints.close()
    folder.release()


def _start(
  job: Job, folder: RunFolder, checkpoints: RunCheckpoints, console: Console
) -> tuple[Progress, MetricsFile]:
  """Stage 3: returns where the run stands and its metrics up to there."""
  path = folder.path('metrics.jsonl')
  found = checkpoints.restore(job.state)
  if found is not None:
    state, record = found
    if record.pop('data_digest') != job.digest:
      raise CheckpointError(
        f'the data of {job.spec.data.train!r} is not what {folder.root} was'
        ' trained on; restore it, or choose another --workdir'
      )
    progress = Progress(state=state, **record)
    console.print(f'continuing after step {progress.step}')
    if progress.step < job.steps:
      folder.path('summary.json').unlink(missing_ok=True)
    return progress, MetricsFile(path, up_to=progress.step)
  metrics = MetricsFile(path, up_to=-1)
  loss = evaluation.held_out_loss(job, job.state.trainable)
  answers = evaluation.answer(job, job.state.trainable)
  before = {'eval_loss': loss.loss, **answers.fields()}
  metrics.append({'step': 0, **before})
  console.print(f'base: {_sentence(before)}')
  texts = answers.texts[: job.spec.eval.samples]
  artifacts.write_samples(job, folder, texts)
  return Progress(job.state, before, texts, best_loss=loss.loss), metrics


def _advance(
  job: Job,
  folder: RunFolder,
  checkpoints: RunCheckpoints,
  progress: Progress,
  metrics: MetricsFile,
  console: Console,
) -> bool:
  """Stage 4: returns whether the last step was reached."""
  spec = job.spec
  ticker = Ticker(console, job.steps, progress.step)
  with StopRequest() as stop, ticker:
    for step in range(progress.step, job.steps):
      line = _step(job, progress, step)
      done, last = step + 1, step + 1 == job.steps
      if last or done % spec.log.every == 0:
        metrics.append(line)
        ticker.tick(line)
      if last or done % spec.eval.every == 0:
        ticker.say(_evaluate(job, folder, progress, metrics))
      if last or stop.requested or done % spec.train.checkpoint_every == 0:
        checkpoints.save(progress.state, progress.record(job))
      if stop.requested and not last:
        console.print(f'stopped after step {done}; run again to continue')
        return False
  return True


def _step(job: Job, progress: Progress, step: int) -> dict[str, Any]:
  """Makes one update and returns its line of metrics.jsonl."""
  began = time.perf_counter()
  batch = job.place(job.loader.batch(step))
  progress.state, measured = job.step(progress.state, job.frozen, batch)
  measured = jax.device_get(measured)
  seconds = time.perf_counter() - began
  progress.skipped = 0 if measured['finite'] else progress.skipped + 1
  if progress.skipped > job.spec.train.max_skipped:
    raise NonFiniteError(
      f'loss or gradient was not finite in {progress.skipped} updates up to'
      f' step {step + 1}, and none of them was applied; lower'
      ' optim.learning_rate, or look at the data of these steps'
    )
  return {
    'step': step + 1,
    'loss': float(measured['loss']),
    'tokens': int(measured['tokens']),
    'grad_norm': float(measured['grad_norm']),
    'learning_rate': float(job.schedule(step)),
    'skipped': progress.skipped,
    'step_seconds': seconds,
    'tokens_per_s': batch.tokens.size / seconds,
  }


def _evaluate(
  job: Job, folder: RunFolder, progress: Progress, metrics: MetricsFile
) -> str:
  """Measures the held-out loss, keeps the best adapter, and says both."""
  trainable, step = progress.state.trainable, progress.step
  loss = evaluation.held_out_loss(job, trainable)
  metrics.append({'step': step, 'eval_loss': loss.loss})
  better = loss.loss < progress.best_loss
  if better:
    progress.best_loss = loss.loss
    artifacts.save_trained(job, folder, 'best', trainable, step)
  note = ', the best so far' if better else ''
  return f'step {step}: held-out loss {loss.loss:.4f}{note}'


def _finish(
  job: Job,
  folder: RunFolder,
  progress: Progress,
  metrics: MetricsFile,
  console: Console,
) -> None:
  """Stage 5."""
  if folder.path('summary.json').exists():
    console.print(f'{folder.root} is complete; nothing to do')
    return
  trainable = progress.state.trainable
  answers = evaluation.answer(job, trainable)
  lines = metrics.read()
  losses = [line['eval_loss'] for line in lines if 'eval_loss' in line]
  after = {'eval_loss': losses[-1], **answers.fields()}
  name = 'adapter' if job.spec.is_adapter else 'model'
  artifacts.save_trained(job, folder, name, trainable, progress.step)
  artifacts.write_samples(job, folder, progress.texts, answers.texts)
  scores = {
    'base_model': progress.before,
    'best_eval_loss': progress.best_loss,
    'tuned_model': after,
  }
  artifacts.write_summary(job, folder, lines, scores)
  console.print(f'base:  {_sentence(progress.before)}')
  console.print(f'tuned: {_sentence(after)}')
  console.print(f'written to {pathlib.Path(folder.root).absolute()}')


def _sentence(scores: dict[str, float]) -> str:
  text = f'held-out loss {scores["eval_loss"]:.4f}'
  if 'exact_match' in scores:
    text += (
      f', exact match {scores["exact_match"]:.1%} and well-formed answers'
      f' {scores["well_formed"]:.1%} of {scores["scored"]}'
    )
  return text
