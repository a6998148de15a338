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
    experts: Feed-forward blocks among which a router chooses; 0 for one block.
    experts_per_token: How many it chooses.
    normalize_experts: Whether the weights of those that it chose add up to 1.
    max_positions: Longest sequence that the base was trained for, in tokens.
    rope_theta: Base of the rotary wavelengths.
    rope_scaling: None for plain rotary embeddings.
    local_rope_theta: Of local layers, without `rope_scaling`; None where theirs
      is that of the others.
    rotary_share: How much of each head's features is rotated.
    learned_positions: Whether positions are looked up in a table and added to
      the embedding, instead of rotary embeddings.
    norm: 'rms'; 'rms_plus_one', whose scale is stored as its distance from
      one; or 'layer', which subtracts the mean and has a bias.
    norm_eps: Added to the mean square, or to the variance.
    post_norms: Whether the results of attention and of the feed-forward block
      are normalized too.
    activation: 'silu', or 'gelu' in its approximation by tanh.
    gated: Whether one half of the feed-forward block multiplies the other.
    scaled_embeddings: Whether embeddings are multiplied by the square root of
      their width.
    query_scalar: Scores are divided by its square root; None is `head_dim`.
    attention_cap: Scores s become cap * tanh(s / cap); None leaves them.
    logit_cap: Likewise of the logits.
    tie_embeddings: Whether the output head is the embedding, transposed.
    fused: Linear layers of which one stands for several: 'qkv_proj',
      'gate_up_proj'.
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
  experts: int = 0
  experts_per_token: int = 0
  normalize_experts: bool = True
  max_positions: int = 2048
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  local_rope_theta: float | None = None
  rotary_share: float = 1.0
  learned_positions: bool = False
  norm: str = 'rms'
  norm_eps: float = 1e-5
  post_norms: bool = False
  activation: str = 'silu'
  gated: bool = True
  scaled_embeddings: bool = False
  query_scalar: float | None = None
  attention_cap: float | None = None
  logit_cap: float | None = None
  tie_embeddings: bool = True
  fused: tuple[str, ...] = ()
  biases: tuple[str, ...] = ()
  qk_norm: bool = False
  sliding_window: int | None = None
  local_layers: tuple[int, ...] = ()
  unrotated_layers: tuple[int, ...] = ()
