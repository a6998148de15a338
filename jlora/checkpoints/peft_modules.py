"""The modules of a base, which is what PEFT names where jlora has leaves."""

import collections
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

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
    experts: Those that a router chooses among.
    parameters: Parameters of transformers that stand for the experts of a
      layer, or for their router, in order: for each of the kernels that lie
      one behind the other in them, the modules of all experts.
    owners: Modules of transformers that hold these parameters, by the modules
      that the parameters stand for.
    layers: Number of decoder layers.
    vocab_size: Rows of the embedding.
  """

  every: frozenset[str]
  linear: frozenset[str]
  embedding: str
  head: str
  shared: frozenset[str]
  stacks: tuple[tuple[str, ...], ...]
  experts: frozenset[str]
  parameters: Mapping[str, tuple[tuple[str, ...], ...]]
  owners: Mapping[str, str]
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
  parameters = dict(_parameters(config))
  return Modules(
    every=frozenset([*(m for w in leaves for m in w.modules), head]),
    linear=frozenset(m for w in leaves if w.linear for m in w.modules),
    embedding=embedding,
    head=head,
    shared=frozenset([embedding, head] if config.tie_embeddings else []),
    stacks=tuple(dict.fromkeys(w.modules for w in leaves if w.stacked)),
    experts=frozenset(m for w in leaves if len(w.stack) > 1 for m in w.modules),
    parameters=parameters,
    owners={
      module: parameter.rpartition('.')[0]
      for parameter, parts in parameters.items()
      for modules in parts
      for module in modules
    },
    plain=FAMILIES[config.family].plain,
    layers=config.layers,
    vocab_size=config.vocab_size,
  )


def _parameters(
  config: DecoderConfig,
) -> Iterator[tuple[str, tuple[tuple[str, ...], ...]]]:
  def modules(path: str, layer: int) -> tuple[str, ...]:
    module = module_of(config, path)
    module = module.replace('{}', str(layer), 1)
    count = config.experts if '{}' in module else 1
    return tuple(module.replace('{}', str(i)) for i in range(count))

  for i in range(config.layers):
    for name, parts in FAMILIES[config.family].parameters.items():
      yield name.replace('{}', str(i)), tuple(modules(x, i) for x in parts)


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


def shorten_parameters(
  chosen: Collection[str], base: Modules
) -> dict[str, tuple[str, ...]]:
  """Names parameters without their layers where they are chosen in all.

  Args:
    chosen: Parameters of `base`.
    base: The base that they are part of.

  Returns:
    The parameters that each name means to PEFT.
  """
  layers = collections.defaultdict(list)
  for parameter in base.parameters:
    layers[re.sub(r'^.*?\.\d+\.', '', parameter)].append(parameter)
  names: dict[str, tuple[str, ...]] = {}
  for name, every in layers.items():
    meant = tuple(p for p in every if p in chosen)
    alone = {p: (p,) for p in meant}
    names |= {name: meant} if len(meant) == len(every) else alone
  return names
