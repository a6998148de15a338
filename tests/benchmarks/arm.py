"""An arm that does as its work says."""

import os
import signal
import time

from experiments.benchmarks.harness import worker


def run(work):
  if name := work.get('lacks'):
    __import__(name)
  if work.get('killed'):
    os.kill(os.getpid(), signal.SIGKILL)
  if work.get('waits'):
    time.sleep(60)
  print('a line of its own')
  return {
    'tokens_per_s': 1.0 if not work.get('fails') else work['nothing'],
    'processors': len(os.sched_getaffinity(0)),
    'openmp': os.environ['OMP_NUM_THREADS'],
  }


if __name__ == '__main__':
  worker.serve(run)
