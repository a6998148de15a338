"""What the models of one family have in common."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def _no_fields() -> Mapping[str, Any]:
  return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What the models of one `model_type` have in common.

  Attributes:
    architecture: Class in transformers.
    traits: Fields of DecoderConfig that have one value in all of them.
    names: Modules of Hugging Face by path, where they differ from Llama's.
    plain: Whether kernels are stored as they are used, [in, out].
    aliases: Fields of config.json that other families name otherwise, with
      the name there.
    fields: Fields of DecoderConfig that only some families have, with those of
      config.json.
    defaults: Of fields that config.json may lack, as in transformers.
    mlp_ratio: Width of the feed-forward block by that of the residual stream,
      where config.json need not say it.
    needs: Fields of config.json whose other values would need other
      arithmetic, with the values that are computed.
    bias_fields: Fields of config.json that say whether linear layers, beside
      those of `traits`, add a bias.
    window: Which layers see a window of `sliding_window` tokens: 'all'; those
      of `layer_types`, where `use_sliding_window` is 'switched' on; or those
      of `layer_types`, by default all but every `period`-th, 'mixed'. None for
      models that know no window.
    period: See `window`.
    local_theta: Base of the rotary wavelengths in layers that see a window,
      where config.json does not say it; None where it is that of the others.
    skips_rope: Whether there are layers without rotary embeddings. They are
      those that see a window, where config.json has no `layer_types`.
    parameters: Parameters that transformers keeps for all experts of a layer,
      or for their router, by name with {} for the layer: the modules here
      whose kernels lie one behind the other in them.
    buffers: Ends of the names of stored tensors that are computed, not learned.
    prefix: Of names of modules, which the files of some programs leave out.
  """

  architecture: str
  traits: Mapping[str, Any] = dataclasses.field(default_factory=_no_fields)
  names: Mapping[str, str] = dataclasses.field(default_factory=_no_fields)
  plain: bool = False
  aliases: Mapping[str, str] = dataclasses.field(default_factory=_no_fields)
  fields: Mapping[str, str] = dataclasses.field(default_factory=_no_fields)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=_no_fields)
  mlp_ratio: int | None = None
  needs: Mapping[str, tuple[Any, ...]] = dataclasses.field(
    default_factory=_no_fields
  )
  bias_fields: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=_no_fields
  )
  window: str | None = None
  period: int = 1
  local_theta: float | None = None
  skips_rope: bool = False
  parameters: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=_no_fields
  )
  buffers: tuple[str, ...] = ('.self_attn.rotary_emb.inv_freq',)
  prefix: str = 'model.'
