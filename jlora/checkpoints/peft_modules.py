"""The modules of a base, which is what PEFT names where jlora has leaves."""

import dataclasses
from collections.abc import Iterator, Mapping

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
    experts=frozenset(m for w in leaves if len(w.stack) > 1 for m in w.modules),
    parameters=dict(_parameters(config)) if config.experts else {},
    plain=FAMILIES[config.family].plain,
    layers=config.layers,
    vocab_size=config.vocab_size,
  )


def _parameters(
  config: DecoderConfig,
) -> Iterator[tuple[str, tuple[tuple[str, ...], ...]]]:
  def modules(name: str, layer: int) -> tuple[str, ...]:
    module = module_of(config, f'layers/mlp/{name}')
    module = module.replace('{}', str(layer), 1)
    count = config.experts if '{}' in module else 1
    return tuple(module.replace('{}', str(i)) for i in range(count))

  for i in range(config.layers):
    block = f'model.layers.{i}.mlp'
    gate, up, down, router = (
      modules(name, i)
      for name in (
        'experts/gate_proj',
        'experts/up_proj',
        'experts/down_proj',
        'router',
      )
    )
    yield f'{block}.gate.weight', (router,)
    yield f'{block}.experts.gate_up_proj', (gate, up)
    yield f'{block}.experts.down_proj', (down,)


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
