"""Run folders, opened again after training."""

import dataclasses
import json
import os
import pathlib

from jlora import config
from jlora.errors import ConfigError
from jlora.inference.tuned import Tuned, load_tuned
from jlora.training.run_spec import RunSpec


def load_spec(run: os.PathLike[str] | str) -> RunSpec:
  """Returns the resolved config that a run folder holds.

  Args:
    run: The folder, as `jlora.train` left it.

  Raises:
    ConfigError: It is no run folder.
  """
  path = pathlib.Path(run) / 'config.json'
  if not path.is_file():
    raise ConfigError(
      f'{str(run)!r} is no run folder: it has no config.json; train with'
      f' --workdir={run} first'
    )
  return config.from_json(path.read_text())


def result_of(run: os.PathLike[str] | str, spec: RunSpec) -> pathlib.Path:
  """Returns where a run put what it trained: `adapter`, or a whole `model`.

  Args:
    run: The folder.
    spec: Its config.

  Raises:
    ConfigError: The run has not ended.
  """
  path = pathlib.Path(run) / ('adapter' if spec.is_adapter else 'model')
  if not (path.is_dir() and (path.parent / 'summary.json').is_file()):
    raise ConfigError(
      f'the run in {str(run)!r} has not ended; let its training end, which'
      f' writes {path.name} and summary.json'
    )
  return path


def origin_of(run: os.PathLike[str] | str) -> dict[str, str]:
  """Returns the digests of the base and the data that a run was made of.

  Args:
    run: The folder of a run that has ended.
  """
  summary = json.loads((pathlib.Path(run) / 'summary.json').read_text())
  return {'base': summary['base_sha256'], 'data': summary['data_digest']}


@dataclasses.dataclass(frozen=True)
class Named:
  """What the flags of a front door name, before anything is opened.

  Attributes:
    base: A base, or the folder of a whole trained model.
    adapter: An adapter's folder; None for none.
    dtype: What it is trained in, as a config says it.
    run: The run's folder; None without one.
  """

  base: str
  adapter: pathlib.Path | None
  dtype: str = 'auto'
  run: pathlib.Path | None = None

  @property
  def sources(self) -> list[pathlib.Path]:
    """The folders and files on this machine that must stay as they are."""
    found = [pathlib.Path(self.base).expanduser()]
    if self.adapter is not None:
      found.append(self.adapter)
    if self.run is not None:
      found += [self.run / name for name in ('adapter', 'model', 'checkpoints')]
    return [path for path in found if path.exists()]


def find_model(run: str | None, base: str | None, adapter: str | None) -> Named:
  """Returns what the flags of a front door name.

  Args:
    run: A run folder, or None.
    base: A base, where there is no run.
    adapter: An adapter on that base, or None.

  Raises:
    ConfigError: The flags name nothing, or too much.
  """
  if (run is None) == (base is None):
    raise ConfigError(
      f'--run is {run!r} and --base is {base!r}; give exactly one of them'
    )
  if run is None:
    return Named(base, None if adapter is None else pathlib.Path(adapter))
  if adapter is not None:
    raise ConfigError(
      f'--adapter={adapter} goes with --base; a run has its own adapter'
    )
  spec, folder = load_spec(run), pathlib.Path(run)
  result = result_of(run, spec)
  if not spec.is_adapter:
    return Named(str(result), None, spec.train.dtype, folder)
  return Named(spec.base, result, spec.train.dtype, folder)


def open_model(
  run: str | None,
  base: str | None,
  adapter: str | None,
  *,
  allow_other_base: bool = False,
) -> Tuned:
  """Opens what the flags of a front door name, to compute with it.

  Args:
    run: As in `find_model`.
    base: Likewise.
    adapter: Likewise.
    allow_other_base: Whether an adapter of another base is accepted.

  Raises:
    ConfigError: As in `find_model`.
  """
  named = find_model(run, base, adapter)
  return load_tuned(
    named.base,
    named.adapter,
    dtype=named.dtype,
    allow_other_base=allow_other_base,
  )
