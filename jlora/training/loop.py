"""The loop of a run. Its stages, in order:

1. claim the run folder, and check the config against a run that is there
2. load the data, compile the step, read the base and split its parameters
3. restore the newest checkpoint, or measure the base on held-out data
4. train: update, log, evaluate, checkpoint; stop on a signal
5. answer the held-out prompts again; write adapter, samples, curves, summary
"""

import os

from rich.console import Console

from jlora.checkpoints.adapters import START_FILE
from jlora.checkpoints.run_folder import MetricsFile, RunFolder
from jlora.checkpoints.runs import RunCheckpoints
from jlora.checkpoints.starts import load_starts, save_starts
from jlora.errors import ConfigError, DataError
from jlora.parallel import processes
from jlora.parallel.devices import warn_of_idle_gpu
from jlora.training import artifacts, evaluation
from jlora.training.console import Ticker, show_table
from jlora.training.job import Job, build
from jlora.training.profiling import Trace
from jlora.training.progress import Progress
from jlora.training.run_spec import RunSpec
from jlora.training.signals import StopRequest


def train(
  spec: RunSpec,
  workdir: os.PathLike[str] | str,
  console: Console,
  *,
  profile: bool = False,
) -> bool:
  """Runs a run to its end, or continues one.

  Args:
    spec: The resolved config.
    workdir: The run's folder.
    console: Where progress is shown.
    profile: Whether a few steps are traced. Of several processes the first
      traces its own devices.

  Returns:
    Whether the run ended; False where a signal stopped it after a checkpoint.

  Raises:
    JloraError: The input is wrong, or the run stopped to protect data.
  """
  warn_of_idle_gpu()
  with RunFolder(workdir, writes=processes.is_first()) as folder:
    folder.check_shared()
    with RunCheckpoints(folder.path('checkpoints')) as checkpoints:
      return _run(spec, folder, checkpoints, console, profile)


def _run(
  spec: RunSpec,
  folder: RunFolder,
  checkpoints: RunCheckpoints,
  console: Console,
  profile: bool,
) -> bool:
  """Goes through the stages; returns whether the run ended."""
  traces = folder.path('profile') if profile and folder.writes else None
  if _is_complete(spec, folder, checkpoints, console):
    if profile:
      console.print('--profile: no step is left, so there is no trace')
    return True
  start = folder.path(START_FILE)
  continued = folder.has(START_FILE) and bool(checkpoints.steps())
  job = build(spec, console, load_starts(start) if continued else None)
  if job.starts and not continued and folder.writes:
    save_starts(start, job.starts)
  console.print(str(job.description), markup=False)
  if job.shardings.mesh.size > 1:
    show_table(console, job.shardings.title(), job.shardings.rows())
  rows = [*job.footprint.rows(), *job.work.rows()]
  show_table(console, 'one training step', rows)
  progress, metrics = _start(spec, job, folder, checkpoints, console)
  trace = Trace(traces, progress.step, job.steps, console.print)
  if not advance(job, folder, checkpoints, progress, metrics, console, trace):
    return False
  _finish(job, folder, progress, metrics, console)
  return True


def _is_complete(
  spec: RunSpec,
  folder: RunFolder,
  checkpoints: RunCheckpoints,
  console: Console,
) -> bool:
  """Stage 1: returns whether the folder's run has ended, and tells changes."""
  ended = folder.has('summary.json')
  if not (ended or checkpoints.steps()):
    if folder.has('metrics.jsonl'):
      console.print('there is no checkpoint yet: starting from the beginning')
    return False
  changes = folder.check_config(spec.to_json())
  longer = {'train.steps', 'train.epochs'} & changes.keys()
  if ended and not longer:
    console.print(f'{folder.root} is complete; nothing to do')
    return True
  if not checkpoints.steps():
    raise ConfigError(
      f'{folder.root} is complete and its checkpoints are gone, so it cannot'
      ' be continued; choose another --workdir'
    )
  for field, (old, new) in changes.items():
    console.print(f'continuing with {field}={new!r}, which was {old!r}')
  return False


def _start(
  spec: RunSpec,
  job: Job,
  folder: RunFolder,
  checkpoints: RunCheckpoints,
  console: Console,
) -> tuple[Progress, MetricsFile]:
  """Stage 3: returns where the run stands, and its metrics up to there."""
  found = checkpoints.restore(job.state)
  if found is not None:
    job.check_origin(found[1]['origin'])
  folder.write('config.json', spec.to_json())
  if found is None:
    return _measure_base(job, folder, console)
  state, record = found
  job.loader.seek(record.get('data') or {})
  progress = Progress(state, **record['progress'])
  console.print(f'continuing after step {progress.step}')
  if progress.step < job.steps:
    folder.remove('summary.json')
  return progress, folder.metrics(up_to=progress.step)


def _measure_base(
  job: Job, folder: RunFolder, console: Console
) -> tuple[Progress, MetricsFile]:
  """Returns a run at step 0, with the base's loss and answers."""
  trainable = job.state.trainable
  loss = evaluation.held_out_loss(job, trainable).loss
  answers = evaluation.answer(job, trainable)
  before = {'eval_loss': loss, **answers.fields()}
  metrics = folder.metrics(up_to=-1)
  metrics.append({'step': 0, **before})
  console.print(f'base: {evaluation.sentence(before)}')
  texts = answers.texts[: job.spec.eval.samples]
  artifacts.write_samples(job, folder, texts)
  return Progress(job.state, before, texts, eval_loss=loss), metrics


def advance(
  job: Job,
  folder: RunFolder,
  checkpoints: RunCheckpoints,
  progress: Progress,
  metrics: MetricsFile,
  console: Console,
  trace: Trace,
) -> bool:
  """Stage 4: returns whether the last step was reached.

  The devices are a step ahead of what is logged, but where something reads
  what they made: an evaluation, a checkpoint, the edge of a trace. Several
  processes wait for each step, after which they ask each other for signals.

  Args:
    job: The run.
    folder: Its folder.
    checkpoints: Its checkpoints.
    progress: Where it stands; moved on.
    metrics: Its metrics.
    console: Where progress is shown.
    trace: Of some steps, or of none.

  Raises:
    DataError: A batch cannot be read; the steps before it were saved.
    NonFiniteError: Too many updates in a row were not finite.
  """
  spec = job.spec
  with (
    StopRequest() as stop,
    Ticker(console, job.steps, progress.step) as bar,
    trace,
  ):
    trace.begin(progress.step)
    while progress.step < job.steps:
      try:
        progress.start(job)
      except DataError:
        _log(job, progress, metrics, bar, running=0)
        if not processes.are_several() and progress.step:  # of one, others wait
          _save(job, checkpoints, progress)
        raise
      _log(job, progress, metrics, bar, running=1)
      step, last = progress.step, progress.step == job.steps
      # Read once, by all: it may turn true at any time, in any process.
      stopping = last or processes.any_of(stop.requested)
      measures = last or step % spec.eval.every == 0
      saves = stopping or step % spec.train.checkpoint_every == 0
      waited = processes.are_several()  # so they stop at the same step
      if measures or saves or waited or trace.is_edge(step):
        _log(job, progress, metrics, bar, running=0)
      trace.end(step)
      if measures:
        bar.say(_evaluate(job, folder, progress, metrics))
      if saves:
        _save(job, checkpoints, progress)
      if stopping and not last:
        bar.say(f'stopped after step {step}; the same command continues')
        return False
      trace.begin(step)
  return True


def _log(
  job: Job,
  progress: Progress,
  metrics: MetricsFile,
  bar: Ticker,
  *,
  running: int,
) -> None:
  """Writes down the updates that are done, but for some of the latest."""
  for line in progress.finished(job, running=running):
    metrics.append(line)
    bar.tick(line)


def _save(job: Job, checkpoints: RunCheckpoints, progress: Progress) -> None:
  """Saves where the run stands."""
  record = {
    'origin': job.origin,
    'progress': progress.record(),
    'data': job.loader.state(progress.step),
  }
  checkpoints.save(progress.state, record)


def _evaluate(
  job: Job, folder: RunFolder, progress: Progress, metrics: MetricsFile
) -> str:
  """Measures the held-out loss, keeps the best adapter, and says both."""
  trainable, step = progress.state.trainable, progress.step
  loss = evaluation.held_out_loss(job, trainable)
  progress.eval_loss, progress.eval_step = loss.loss, step
  metrics.append({'step': step, 'eval_loss': loss.loss})
  said = f'step {step}: held-out loss {loss.loss:.4f}'
  if not loss.valid:
    return f'{said}, which is not finite; training goes on'
  if progress.best_loss <= loss.loss:
    return said
  progress.best_loss = loss.loss
  if job.spec.is_adapter:
    artifacts.save_trained(job, folder, 'best', trainable, step)
  return f'{said}, the best so far'


def _finish(
  job: Job,
  folder: RunFolder,
  progress: Progress,
  metrics: MetricsFile,
  console: Console,
) -> None:
  """Stage 5."""
  if folder.has('summary.json'):
    console.print(f'{folder.root} is complete; nothing to do')
    return
  if progress.eval_step != progress.step:  # `train.steps` was lowered
    console.print(_evaluate(job, folder, progress, metrics))
  trainable, before = progress.state.trainable, progress.before
  answers = evaluation.answer(job, trainable)
  after = {'eval_loss': progress.eval_loss, **answers.fields()}
  name = 'adapter' if job.spec.is_adapter else 'model'
  artifacts.save_trained(job, folder, name, trainable, progress.step)
  artifacts.write_samples(job, folder, progress.texts, answers.texts)
  speed = artifacts.write_summary(job, folder, progress, metrics, after)
  for line in job.loader.lines():
    console.print(line, markup=False)
  if speed is not None:
    console.print(job.work.sentence(speed))
  console.print(f'base:  {evaluation.sentence(before)}')
  console.print(f'tuned: {evaluation.sentence(after)}')
  console.print(f'written to {folder.root.absolute()}')
