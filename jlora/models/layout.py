"""The leaves of a decoder, with their shapes and Hugging Face's names."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.config import DecoderConfig
from jlora.models.families import FAMILIES, NAMES

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Weight:
  """One leaf of the parameters and where Hugging Face keeps it.

  Attributes:
    path: The leaf's path, joined with `/`.
    modules: HF module paths: one for each place of `stack`, the last axis
      running fastest.
    stack: Sizes of the leading axes over layers and experts; () for a leaf
      that is there once.
    transposed: Whether HF stores `[out, in]` where the leaf is `[in, out]`.
    shape: The leaf's shape, the stacked axes included.
    kind: Name of the tensor in its module: 'weight' or 'bias'.
  """

  path: str
  modules: tuple[str, ...]
  stack: tuple[int, ...]
  transposed: bool
  shape: tuple[int, ...]
  kind: str = 'weight'

  @property
  def stacked(self) -> bool:
    """Whether the leaf has a leading axis."""
    return bool(self.stack)

  @property
  def linear(self) -> bool:
    """Whether it is the kernel of a linear layer."""
    return self.path.endswith('/kernel')

  def places(self) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields indices into the leaf, and the name of the tensor there."""
    yield from zip(np.ndindex(self.stack), self.tensors, strict=True)

  @property
  def tensors(self) -> tuple[str, ...]:
    """Names of the tensors, such as `model.norm.weight`."""
    return tuple(f'{module}.{self.kind}' for module in self.modules)


def weights(config: DecoderConfig) -> Iterator[Weight]:
  """Yields every leaf of a decoder with its Hugging Face names."""
  plain = FAMILIES[config.family].plain
  for path, shape in _shapes(config).items():
    parent, name = path.rsplit('/', 1)
    module = module_of(config, parent)
    stack = (config.layers, config.experts)[: module.count('{}')]
    yield Weight(
      path=path,
      modules=tuple(_filled(module, stack)),
      stack=stack,
      transposed=name == 'kernel' and not plain,
      shape=shape,
      kind='bias' if name == 'bias' else 'weight',
    )


def module_of(config: DecoderConfig, parent: str) -> str:
  """Returns the name of a module in Hugging Face.

  Args:
    config: The decoder's.
    parent: Path of the module here, such as `layers/mlp/up_proj`.

  Returns:
    The name, with {} for the layer and another for the expert.
  """
  return FAMILIES[config.family].names.get(parent) or NAMES[parent]


def _filled(module: str, stack: tuple[int, ...]) -> Iterator[str]:
  """Yields the module's name at every place of the stack."""
  if not stack:
    yield module
    return
  for i in range(stack[0]):
    yield from _filled(module.replace('{}', str(i), 1), stack[1:])


def by_path(config: DecoderConfig) -> dict[str, Weight]:
  """Returns all leaves, keyed by their paths.

  Args:
    config: The decoder's sizes.
  """
  return {weight.path: weight for weight in weights(config)}


def shapes(
  config: DecoderConfig, dtype: Any = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns every leaf of a decoder by path, without its numbers."""
  return {
    path: jax.ShapeDtypeStruct(shape, dtype)
    for path, shape in _shapes(config).items()
  }


def _shapes(c: DecoderConfig) -> Shapes:
  layer = _norm(c, 'attention_norm')
  layer |= _norm(c, 'post_attention_norm') if c.post_norms else {}
  layer |= _norm(c, 'mlp_norm')
  layer |= _norm(c, 'post_mlp_norm') if c.post_norms else {}
  for name, shape in {**_attention(c), **_mlp(c)}.items():
    layer[f'{name}/kernel'] = shape
    if name.rpartition('/')[2] in c.biases:
      layer[f'{name}/bias'] = shape[-1:]
  if c.qk_norm:
    layer['attention/q_norm/scale'] = (c.head_dim,)
    layer['attention/k_norm/scale'] = (c.head_dim,)
  found = {'embed/embedding': (c.vocab_size, c.embed_dim)}
  if c.learned_positions:
    found['position_embed/embedding'] = (c.max_positions, c.embed_dim)
  found |= {f'layers/{path}': (c.layers, *s) for path, s in layer.items()}
  found |= _norm(c, 'final_norm')
  if not c.tie_embeddings:
    found['lm_head/kernel'] = (c.embed_dim, c.vocab_size)
  return found


def _norm(c: DecoderConfig, name: str) -> Shapes:
  parts = ('scale', 'bias') if c.norm == 'layer' else ('scale',)
  return {f'{name}/{part}': (c.embed_dim,) for part in parts}


def _attention(c: DecoderConfig) -> Shapes:
  """Returns the shapes of the kernels in attention."""
  wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
  widths = {'q_proj': wide, 'k_proj': narrow, 'v_proj': narrow}
  if 'qkv_proj' in c.fused:
    widths = {'qkv_proj': wide + 2 * narrow}
  found = {f'attention/{name}': (c.embed_dim, n) for name, n in widths.items()}
  return {**found, 'attention/o_proj': (wide, c.embed_dim)}


def _mlp(c: DecoderConfig) -> Shapes:
  """Returns the shapes of the kernels in the feed-forward block."""
  widths = {'gate_proj': c.mlp_dim} if c.gated else {}
  widths['up_proj'] = c.mlp_dim
  if 'gate_up_proj' in c.fused:
    widths = {'gate_up_proj': 2 * c.mlp_dim}
  kernels = {name: (c.embed_dim, n) for name, n in widths.items()}
  kernels['down_proj'] = (c.mlp_dim, c.embed_dim)
  if not c.experts:
    return {f'mlp/{name}': shape for name, shape in kernels.items()}
  found = {'mlp/router': (c.embed_dim, c.experts)}
  for name, shape in kernels.items():
    found[f'mlp/experts/{name}'] = (c.experts, *shape)
  return found


def head_path(config: DecoderConfig) -> str:
  """Returns the path of the leaf that makes logits."""
  return 'embed/embedding' if config.tie_embeddings else 'lm_head/kernel'
