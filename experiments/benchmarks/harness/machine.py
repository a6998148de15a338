"""Where and with what figures were measured."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

from experiments.benchmarks.harness.processes import ROOT

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'transformers',
  'torch',
  'peft',
  'bitsandbytes',
  'qwix',
)


def describe(threads: int) -> dict[str, Any]:
  """Returns the machine, the versions and the commit.

  Args:
    threads: Processors each process may use.
  """
  return {
    'machine': {
      'processor': _processor(),
      'processors': os.cpu_count(),
      'threads': threads,
      'memory_gib': _memory_gib(),
      'system': f'{platform.system()} {platform.machine()}',
    },
    'versions': {'python': platform.python_version(), **_versions()},
    'commit': _commit(),
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
    'xla_flags': os.getenv('XLA_FLAGS', ''),
  }


def _processor() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or 'unknown'


def _memory_gib() -> float | None:
  try:
    pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (ValueError, OSError):
    return None
  return round(pages / 2**30, 1)


def _versions() -> dict[str, str]:
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _commit() -> str:
  """Returns the commit, with `+` behind it where files have changed."""
  try:
    commit = _git('rev-parse', '--short=12', 'HEAD')
    changed = _git('status', '--porcelain', '--untracked-files=no')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return commit + ('+' if changed else '')


def _git(*command: str) -> str:
  return subprocess.run(
    ['git', '-C', str(ROOT), *command],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
