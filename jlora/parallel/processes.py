"""Several processes that train together, such as one on each host.

All of them run the same program and must come to the same decisions in the
same order: what only one of them knows is shared here before it counts. With
one process, every function returns at once.
"""

import hashlib
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jlora.errors import ConfigError

# A process that says nothing for so long has failed, and all of them end.
HEARTBEAT_SECONDS = 20
_CONNECT_SECONDS = 300
_FINISH_SECONDS = 3600  # the first one may still write a large model


def connect(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Connects this process with the others; before anything is computed.

  Without arguments, JAX finds the others itself: under SLURM and Open MPI, on
  Kubernetes and on TPUs.

  Args:
    coordinator: HOST:PORT of the first process.
    processes: How many there are.
    process: Which one this is, from 0.

  Raises:
    ConfigError: The arguments are incomplete, no cluster was found, or the
      others did not come.
  """
  _check(coordinator, processes, process)
  began = time.monotonic()
  # It would take SIGTERM over, and keep it from all who do not ask for it.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      initialization_timeout=_CONNECT_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_FINISH_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).splitlines() or [''])[0]
    raise ConfigError(
      f'the processes could not be connected after'
      f' {time.monotonic() - began:.0f} s: {reason}; start each of them with'
      ' --coordinator=HOST:PORT --processes=N --process=I, I from 0'
    ) from error


def _check(
  coordinator: str | None, processes: int | None, process: int | None
) -> None:
  """Refuses arguments that jax would wait for minutes with, or misread."""
  given = (coordinator, processes, process)
  if given == (None, None, None):
    return
  if None in given:
    raise ConfigError(
      f'--coordinator={coordinator}, --processes={processes} and'
      f' --process={process} belong together; give all three, or only'
      ' --distributed where JAX finds the cluster itself'
    )
  if not 0 <= process < processes:
    raise ConfigError(
      f'--process={process} is none of --processes={processes}, which are'
      ' counted from 0'
    )
  host, colon, port = coordinator.rpartition(':')
  if not (host and colon and port.isdecimal() and int(port) < 1 << 16):
    raise ConfigError(
      f'--coordinator={coordinator} is no HOST:PORT, such as 10.0.0.1:1234'
    )


def is_first() -> bool:
  """Whether this process writes what only one may write."""
  return jax.process_index() == 0


def are_several() -> bool:
  """Whether there is more than one process."""
  return jax.process_count() > 1


def wait(what: str) -> None:
  """Returns once all processes are here.

  Args:
    what: What they wait for; the same in all of them.
  """
  if are_several():
    multihost_utils.sync_global_devices(what)


def any_of(flag: bool) -> bool:
  """Returns whether some process says yes.

  Args:
    flag: What this one says.
  """
  if not are_several():
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first(text: str | None) -> str:
  """Returns the text that the first process has.

  Args:
    text: Of up to 128 bytes; of other processes it is not used.
  """
  if not are_several():
    return text
  raw = np.zeros(128, np.uint8)
  if is_first():
    found = np.frombuffer(text.encode(), np.uint8)
    raw[: found.size] = found
  raw = np.asarray(multihost_utils.broadcast_one_to_all(raw))
  return raw.tobytes().rstrip(b'\0').decode()


def require_same(what: str, text: str) -> None:
  """Refuses to go on where processes differ in what they must share.

  Args:
    what: What it is, for the message.
    text: What this process has.

  Raises:
    ConfigError: Some process has another one; raised in all of them.
  """
  if not are_several():
    return
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  found = multihost_utils.process_allgather(digest)
  others = [i for i, x in enumerate(found) if not np.array_equal(x, found[0])]
  if others:
    raise ConfigError(
      f'processes {others} have another {what} than process 0; start all of'
      ' them with the same command, on hosts that have the same files'
    )


def whole(array: Any) -> np.ndarray:
  """Returns an array whose parts may lie on the devices of other processes.

  All processes must call it for the same arrays in the same order.

  Args:
    array: A NumPy or JAX array.
  """
  lies_here = getattr(array, 'is_fully_addressable', True)
  if lies_here or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def rows_here(rows: int, sharding: NamedSharding) -> slice:
  """Returns which rows of an array this process's devices hold.

  Args:
    rows: Of the array, over all processes.
    sharding: How its first axis is cut.
  """
  placed = sharding.addressable_devices_indices_map((rows,))
  bounds = [index[0].indices(rows)[:2] for index in placed.values()]
  return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))


def spread(
  array: Any,
  sharding: NamedSharding,
  *,
  rows: int | None = None,
  first: int = 0,
) -> jax.Array:
  """Returns an array that is cut over the devices of all processes.

  Args:
    array: The whole array, or at least the rows that `rows_here` names.
    sharding: How it is cut.
    rows: Of the result; None where `array` is whole.
    first: Index in the result of the first row in `array`.
  """
  array = np.asarray(array)
  if rows is None:
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  def part(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[0].indices(rows)
    return array[start - first : stop - first, *index[1:]]

  shape = (rows, *array.shape[1:])
  return jax.make_array_from_callback(shape, sharding, part)
