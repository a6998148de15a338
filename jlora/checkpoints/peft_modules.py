"""The modules of a base, which is what PEFT names where jlora has leaves."""

import dataclasses

from jlora.models.config import DecoderConfig
from jlora.models.families import FAMILIES
from jlora.models.layout import module_of, weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modules:
  """The modules of a base that have a weight, as PEFT sees them.

  Attributes:
    every: Names of all of them.
    linear: Linear layers with a tensor of their own.
    embedding: The one that looks tokens up.
    head: The one that makes logits.
    shared: Those that are one tensor: embedding and head, or none.
    stacks: Those that are one stacked leaf, for each of these leaves.
    plain: Whether the kernels of linear layers are stored as [in, out].
    layers: Number of decoder layers.
    vocab_size: Rows of the embedding.
  """

  every: frozenset[str]
  linear: frozenset[str]
  embedding: str
  head: str
  shared: frozenset[str]
  stacks: tuple[tuple[str, ...], ...]
  plain: bool
  layers: int
  vocab_size: int

  def twin(self, module: str) -> str | None:
    """Returns the other module with the same tensor, if there is one."""
    others = self.shared - {module} if module in self.shared else ()
    return next(iter(others), None)


def make_modules(config: DecoderConfig) -> Modules:
  """Returns the modules of a decoder."""
  leaves = list(weights(config))
  embedding, head = (module_of(config, x) for x in ('embed', 'lm_head'))
  return Modules(
    every=frozenset([*(m for w in leaves for m in w.modules), head]),
    linear=frozenset(m for w in leaves if w.linear for m in w.modules),
    embedding=embedding,
    head=head,
    shared=frozenset([embedding, head] if config.tie_embeddings else []),
    stacks=tuple(dict.fromkeys(w.modules for w in leaves if w.stacked)),
    plain=FAMILIES[config.family].plain,
    layers=config.layers,
    vocab_size=config.vocab_size,
  )


def shorten(chosen: frozenset[str], base: Modules) -> list[str]:
  """Names modules by their last part where that means no others to PEFT.

  PEFT compares the ends of names: 'norm' would mean 'input_layernorm' too.

  Args:
    chosen: Modules.
    base: The base that they are part of.
  """
  names = set()
  for module in chosen:
    last = module.rpartition('.')[2]
    meant = {m for m in base.every if m.endswith(last)}
    names.add(last if meant <= chosen else module)
  return sorted(names)
