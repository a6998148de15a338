"""Arms of a benchmark, each run in a fresh process.

An arm is a module with `if __name__ == '__main__': worker.serve(run)`, where
`run` takes the dict `Arm.work` and returns a flat dict of figures.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.benchmarks.harness.worker import MARK
from jlora.errors import JloraError

ROOT = pathlib.Path(__file__).parents[3]
REMEDY = "pip install -e '.[bench]'"


class ArmError(JloraError):
  """An arm could not be run; the message names it and says what to do."""


@dataclasses.dataclass(frozen=True)
class Arm:
  """One of those that are compared.

  Attributes:
    name: What tables call it.
    module: What is run, such as `experiments.benchmarks.arms.peft`.
    work: What it is asked for, as JSON takes it.
  """

  name: str
  module: str
  work: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Limits:
  """What each process gets.

  Attributes:
    threads: Processors it may use.
    seconds: After which it is ended.
    cache: Folder of compiled programs, with one folder an arm.
  """

  threads: int
  seconds: float
  cache: pathlib.Path


def run(arm: Arm, limits: Limits) -> dict[str, Any]:
  """Runs an arm to its end, in a process of its own.

  Args:
    arm: The arm.
    limits: What its process gets.

  Returns:
    Its figures, with `arm`, and with `cold`: whether it had to compile.

  Raises:
    ArmError: It needs a package that is missing, or it failed.
  """
  cache = limits.cache / arm.name.replace('/', '-').replace(' ', '-')
  cold = not (cache.is_dir() and any(cache.iterdir()))
  answer = _answer(arm, limits, cache)
  if name := answer.get('missing'):
    raise ArmError(
      f'{arm.name} is left out: it needs the package {name}, which is not'
      f' installed; run {REMEDY}'
    )
  if text := answer.get('error'):
    raise ArmError(f'{arm.name} is left out: it failed with {text}')
  return {'arm': arm.name, 'cold': cold, **answer}


def _answer(arm: Arm, limits: Limits, cache: pathlib.Path) -> dict[str, Any]:
  """Returns what the process wrote."""
  work = {**arm.work, 'threads': limits.threads, 'began': time.time()}
  with tempfile.TemporaryFile('w+') as log:
    try:
      ended = subprocess.run(
        [sys.executable, '-m', arm.module],
        input=json.dumps(work),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        timeout=limits.seconds,
        env=_environment(limits.threads, cache),
        cwd=ROOT,
      )
    except subprocess.TimeoutExpired:
      return {'error': f'no answer in {limits.seconds:g} s; raise --timeout'}
    for line in ended.stdout.splitlines():
      if line.startswith(MARK):
        return json.loads(line.removeprefix(MARK))
    log.seek(0)
    return {'error': _ending(ended.returncode, log.read())}


def _ending(code: int, log: str) -> str:
  """Returns how a process ended that gave no figures."""
  if code < 0:
    return f'signal {-code}, perhaps for want of memory'
  last = [line for line in log.splitlines() if line.strip()][-1:]
  return f'exit code {code}: {" ".join(last) or "nothing was said"}'


def _environment(threads: int, cache: pathlib.Path) -> dict[str, str]:
  """Returns the variables of a process: the same for all arms."""
  path = os.pathsep.join(filter(None, (str(ROOT), os.getenv('PYTHONPATH'))))
  count = str(threads)
  return {
    **os.environ,
    'PYTHONPATH': path,
    'OMP_NUM_THREADS': count,
    'MKL_NUM_THREADS': count,
    'OPENBLAS_NUM_THREADS': count,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'HF_HUB_OFFLINE': '1',
    'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1',
    'TF_CPP_MIN_LOG_LEVEL': '2',
  }


@contextlib.contextmanager
def compiled_programs(folder: str | None) -> Iterator[pathlib.Path]:
  """Yields a folder for compiled programs: an empty one unless it is named.

  Args:
    folder: One that is kept, so that a second call finds the programs.
  """
  if folder:
    path = pathlib.Path(folder).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='jlora-programs-') as made:
    yield pathlib.Path(made)
