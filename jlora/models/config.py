"""The sizes and constants that define a decoder."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Llama 3's stretch of the rotary wavelengths, for contexts beyond training.

  Wavelengths above `original_max_positions / low_freq_factor` are multiplied by
  `factor`, those below `original_max_positions / high_freq_factor` are kept,
  and the ones between are interpolated.

  References:
    Llama Team, `The Llama 3 Herd of Models <https://arxiv.org/abs/2407.21783>`_,
    section 3.2; the rule is that of `rope_type: llama3` in transformers.
  """

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes of a Llama-family decoder.

  Attributes:
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
  """

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
