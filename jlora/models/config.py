"""The sizes and constants that define a decoder."""

import dataclasses

from jlora.models.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes of a decoder, and what it does differently from Llama's.

  Attributes:
    family: Name in `jlora.models.families.FAMILIES`.
    vocab_size: Rows of the embedding.
    embed_dim: Width of the residual stream.
    mlp_dim: Width inside the feed-forward block.
    layers: Number of decoder layers.
    heads: Query heads.
    kv_heads: Key and value heads; divides `heads`.
    head_dim: Width of one head.
    max_positions: Longest sequence that the base was trained for, in tokens.
    rope_theta: Base of the rotary wavelengths.
    rope_scaling: None for plain rotary embeddings.
    norm_eps: Added to the mean square in RMSNorm.
    tie_embeddings: Whether the output head is the embedding, transposed.
    biases: Linear layers that add a bias, such as 'q_proj'.
    qk_norm: Whether each head's queries and keys are normalized.
    sliding_window: How many tokens a local layer sees, its own among them.
    local_layers: Layers that see a window only.
    unrotated_layers: Layers without rotary embeddings.
  """

  family: str = 'llama'
  vocab_size: int
  embed_dim: int
  mlp_dim: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  max_positions: int = 2048
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  biases: tuple[str, ...] = ()
  qk_norm: bool = False
  sliding_window: int | None = None
  local_layers: tuple[int, ...] = ()
  unrotated_layers: tuple[int, ...] = ()
