"""What is trained on, resolved and checked."""

import dataclasses
from typing import Any

from jlora.data.fitting import TOO_LONG
from jlora.data.mixing import make_sources
from jlora.data.rows import make_columns
from jlora.data.templates import make_fields
from jlora.data.thinking import KEEP
from jlora.data.tokens import LEARN
from jlora.errors import ConfigError
from jlora.training.checks import choose, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
  """What is trained on and what is held out.

  Attributes:
    train: `reasoning_gym:TASK`, a data file, a folder of such files, or a hub
      id; several of these, or pairs of each with its weight.
    eval: One of these; None holds out a share of `train`, or takes the valid
      files of a folder.
    columns: Pairs of a field of a row and the column that holds it, or of a
      source and such pairs; () reads columns by their names.
    learn: What is learned of a conversation: 'completions', what the assistant
      says; 'last', the last of these turns whose weight is not 0; 'all',
      whatever the chat template writes, so that no weight may be 0.
    thinking: 'keep' or 'drop': what is thought before an answer.
    template: Pairs of a field and a value that the chat template gets, such as
      `enable_thinking`.
    max_length: Tokens a row.
    too_long: What happens to conversations longer than a row: 'cut', 'drop' or
      'error'. Text is always split.
    stream: Whether rows are read while the run trains, for data that is larger
      than memory.
    shuffle_buffer: Examples that are then shuffled and packed together.
    pack: Whether several examples share a row.
    train_examples: Examples to train on; None is all. A generator needs it,
      unless it is streamed.
    eval_examples: Examples held out.
  """

  train: str | tuple[Any, ...]
  eval: str | None = None
  columns: tuple[Any, ...] | str = ()
  learn: str = 'completions'
  thinking: str = 'keep'
  template: tuple[Any, ...] | str = ()
  max_length: int = 256
  too_long: str = 'cut'
  stream: bool = False
  shuffle_buffer: int = 4096
  pack: bool = True
  train_examples: int | None = None
  eval_examples: int = 200

  def __post_init__(self) -> None:
    """Checks the fields."""
    if not self.train:
      raise ConfigError('data.train is empty; name a data file or a source')
    object.__setattr__(self, 'train', make_sources(self.train))
    object.__setattr__(self, 'columns', make_columns(self.columns))
    self._check_columns()
    object.__setattr__(self, 'template', make_fields(self.template))
    if self.max_length < 2:
      raise ConfigError(
        f'data.max_length is {self.max_length}; it must be 2 tokens or more'
      )
    require('data', self, 'train_examples', 'eval_examples', 'shuffle_buffer')
    choose('data', self, learn=LEARN, thinking=KEEP, too_long=TOO_LONG)

  def _check_columns(self) -> None:
    known = [name for name, _ in self.sources] + [self.eval]
    for name, column in self.columns:
      if not isinstance(column, str) and name not in known:
        raise ConfigError(
          f'data.columns names the source {name!r}, which is none of'
          f' data.train and data.eval: {known}'
        )

  @property
  def sources(self) -> tuple[tuple[str, float | None], ...]:
    """What is trained on, each source with its weight or None."""
    if isinstance(self.train, str):
      return ((self.train, None),)
    return self.train
