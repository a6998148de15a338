"""What the GGUF files of one `general.architecture` have in common.

A key of the metadata says one field of DecoderConfig. What no key says is fixed
by the architecture, in the code of llama.cpp: it is given here, so that a file
is read as llama.cpp computes it, and what differs is not written.

References:
  `llama.cpp <https://github.com/ggml-org/llama.cpp>`_, `src/models/`, functions
  `load_arch_hparams` and `load_arch_tensors`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_KEYS = {
  'embed_dim': 'embedding_length',
  'head_dim': 'attention.key_length',
  'heads': 'attention.head_count',
  'kv_heads': 'attention.head_count_kv',
  'layers': 'block_count',
  'max_positions': 'context_length',
  'mlp_dim': 'feed_forward_length',
  'norm_eps': 'attention.layer_norm_rms_epsilon',
}
_ROPE = {'rope_theta': 'rope.freq_base'}
_EXPERTS = {
  'experts': 'expert_count',
  'experts_per_token': 'expert_used_count',
}
_WINDOW = {'sliding_window': 'attention.sliding_window'}
_LOGIT_CAP = {'logit_cap': 'final_logit_softcapping'}


def _nothing() -> Mapping[str, Any]:
  return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """What the files of one `general.architecture` have in common.

  Attributes:
    families: `model_type`s that are written so. Read is the first, or the one
      that is named by `with_experts`.
    with_experts: See above.
    keys: Field of DecoderConfig -> its key, behind the architecture's name.
    defaults: Of fields whose key may be missing, as in llama.cpp.
    permuted: Whether rows of queries and keys are.
    biased: Whether linear layers may add a bias where the family's do not
      always.
    factors: Whether divisors of the rotary frequencies may be stored.
    part_rotated: Whether fewer features than a head has may be rotated.
    window: Which layers see a window, where there is one: 'all', or all but
      every so many. None where there is no key for it. (llama.cpp reads that of
      Phi-3, but does not compute with it.)
    skips_rope: Every so many layers have no rotary embeddings; 0 for none.
    wide: Layers of the one model whose attention scores are divided by the
      root of embed_dim / heads, where the family has that field.
  """

  families: tuple[str, ...]
  with_experts: str | None = None
  keys: Mapping[str, str]
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=_nothing)
  permuted: bool = False
  biased: bool = False
  factors: bool = False
  part_rotated: bool = False
  window: int | str | None = None
  skips_rope: int = 0
  wide: int | None = None


ARCHITECTURES = {
  'llama': Architecture(
    families=('llama', 'mistral', 'mixtral'),
    with_experts='mixtral',
    keys={**_KEYS, **_ROPE, **_EXPERTS},
    permuted=True,
    biased=True,
    factors=True,
  ),
  'qwen2': Architecture(families=('qwen2',), keys={**_KEYS, **_ROPE}),
  'qwen3': Architecture(families=('qwen3',), keys={**_KEYS, **_ROPE}),
  'qwen3moe': Architecture(
    families=('qwen3_moe',),
    keys={
      **_KEYS, **_ROPE, **_EXPERTS, 'mlp_dim': 'expert_feed_forward_length'
    },
  ),
  'smollm3': Architecture(
    families=('smollm3',),
    keys={**_KEYS, **_ROPE},
    permuted=True,
    skips_rope=4,
  ),
  'phi3': Architecture(
    families=('phi3',),
    keys={**_KEYS, **_ROPE, **_WINDOW},
    window='all',
    part_rotated=True,
  ),
  'gemma2': Architecture(
    families=('gemma2',),
    keys={
      **_KEYS,
      **_ROPE,
      **_WINDOW,
      **_LOGIT_CAP,
      'attention_cap': 'attn_logit_softcapping',
    },
    defaults={'sliding_window': 4096, 'attention_cap': 50.0, 'logit_cap': 30.0},
    window=2,
    wide=46,
  ),
  'gemma3': Architecture(
    families=('gemma3_text',),
    keys={
      **_KEYS,
      **_ROPE,
      **_WINDOW,
      **_LOGIT_CAP,
      'local_rope_theta': 'rope.freq_base_swa',
    },
    defaults={'local_rope_theta': 10000.0},
    window=6,
    wide=62,
  ),
  'gpt2': Architecture(
    families=('gpt2',),
    keys={**_KEYS, 'norm_eps': 'attention.layer_norm_epsilon'},
  ),
}  # fmt: skip


def architecture_of(family: str) -> str | None:
  """Returns the name in ARCHITECTURES that a family is written as."""
  for name, architecture in ARCHITECTURES.items():
    if family in architecture.families:
      return name
  return None
