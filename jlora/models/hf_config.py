"""config.json of Hugging Face, read and written."""

from collections.abc import Mapping
from typing import Any

from jlora.errors import BaseModelError
from jlora.models import hf_layers, hf_rope
from jlora.models.config import DecoderConfig
from jlora.models.families import FAMILIES
from jlora.models.family import Family

# Field of DecoderConfig -> field of config.json.
_SIZES = {
  'vocab_size': 'vocab_size',
  'embed_dim': 'hidden_size',
  'mlp_dim': 'intermediate_size',
  'layers': 'num_hidden_layers',
  'heads': 'num_attention_heads',
}
# Fields that say nothing about what is computed, or what is computed anyway.
_HARMLESS = {
  'architectures',
  'attention_dropout',
  'attn_pdrop',
  'auto_map',
  'bos_token_id',
  'cache_implementation',
  'chunk_size_feed_forward',
  'dtype',
  'embd_pdrop',
  'eos_token_id',
  'id2label',
  'initializer_range',
  'is_llama_config',
  'label2id',
  'max_sequence_length',
  'max_window_layers',
  'model_type',
  'n_ctx',
  'output_past',
  'predict_special_tokens',
  'output_attentions',
  'output_hidden_states',
  'output_router_logits',
  'pad_token_id',
  'pretraining_tp',
  'problem_type',
  'resid_pdrop',
  'return_dict',
  'router_aux_loss_coef',
  'router_jitter_noise',
  'summary_activation',
  'summary_first_dropout',
  'summary_proj_to_labels',
  'summary_type',
  'summary_use_proj',
  'task_specific_params',
  'torch_dtype',
  'torchscript',
  'transformers_version',
  'unk_token_id',
  'unsloth_fixed',
  'unsloth_version',
  'use_cache',
}
_USUAL = {
  *_SIZES.values(),
  *hf_rope.FIELDS,
  'head_dim',
  'hidden_act',
  'max_position_embeddings',
  'num_key_value_heads',
  'rms_norm_eps',
  'tie_word_embeddings',
}


def read_config(fields: Mapping[str, Any]) -> DecoderConfig:
  """Reads what a model is from its config.json.

  Args:
    fields: The parsed file.

  Raises:
    BaseModelError: The model is of a family that is not known, or uses a
      feature that this decoder does not compute; the field is named.
  """
  kind = fields.get('model_type')
  family = _family(kind)
  _refuse_others(fields, family)
  fields = usual_fields(fields)
  try:
    return _read(kind, family, fields)
  except KeyError as error:
    field = _own_names(family).get(error.args[0], error.args[0])
    raise BaseModelError(
      f'config.json has no field {field!r}, which a {kind} model needs'
    ) from error


def usual_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of config.json by the names that most families use.

  Those that the file lacks have the values that transformers gives them.

  Args:
    fields: The parsed file.

  Raises:
    BaseModelError: The model is of a family that is not known.
  """
  family = _family(fields.get('model_type'))
  own = {k: v for k, v in fields.items() if k not in family.aliases}
  renamed = {
    usual: fields[name]
    for name, usual in family.aliases.items()
    if name in fields
  }
  return {**family.defaults, **own, **renamed}


def _family(kind: Any) -> Family:
  if kind not in FAMILIES:
    known = ', '.join(map(repr, FAMILIES))
    raise BaseModelError(
      f'model_type {kind!r} is not supported; this version trains {known}'
    )
  return FAMILIES[kind]


def _own_names(family: Family) -> dict[str, str]:
  """Returns a family's own names of fields by the usual ones."""
  return {usual: name for name, usual in family.aliases.items()}


def _refuse_others(fields: Mapping[str, Any], family: Family) -> None:
  """Refuses what would need other arithmetic."""
  known = _known(family)
  unread = {usual for name, usual in family.aliases.items() if name in fields}
  for name, value in fields.items():
    field = family.aliases.get(name, name)
    if name in unread:  # the family's own name of it counts
      continue
    if field in family.needs and value not in family.needs[field]:
      raise BaseModelError(
        f'config.json has {name}={value!r}, which this decoder does not'
        f' compute; it needs {family.needs[field][0]!r}'
      )
    # Names with an underscore or a dot in front are notes of other programs.
    note = field.startswith(('_', 'transformers.'))
    if value and not note and field not in known:
      raise BaseModelError(
        f'config.json has {name}={value!r}, which jlora does not know; if the'
        ' model computes the same without it, take it out of the file'
      )


def _known(family: Family) -> set[str]:
  """Returns the fields that a family's models may have."""
  known = _HARMLESS | _USUAL | hf_layers.FIELDS[family.window]
  known |= hf_layers.ROPE_FIELDS if family.skips_rope else set()
  known |= hf_rope.LOCAL_FIELDS if family.local_theta else set()
  return known.union(
    family.fields.values(), family.needs, family.bias_fields, family.defaults
  )


def _read(
  kind: str, family: Family, fields: Mapping[str, Any]
) -> DecoderConfig:
  heads = fields['num_attention_heads']
  max_positions = fields.get('max_position_embeddings', 2048)
  names = {**_SIZES, **family.fields}
  if family.mlp_ratio and fields.get(names['mlp_dim']) is None:
    width = family.mlp_ratio * fields['hidden_size']
    fields = {**fields, names['mlp_dim']: width}
  return DecoderConfig(
    **{
      'family': kind,
      **{ours: fields.get(theirs) for ours, theirs in names.items()},
      **{ours: fields[names[ours]] for ours in _SIZES},
      'kv_heads': fields.get('num_key_value_heads') or heads,
      'head_dim': fields.get('head_dim') or fields['hidden_size'] // heads,
      'max_positions': max_positions,
      'norm_eps': fields.get('rms_norm_eps', 1e-6),
      'tie_embeddings': bool(fields.get('tie_word_embeddings', False)),
      **hf_rope.read_rope(family, fields, max_positions),
      **hf_layers.read_layers(family, fields),
      **family.traits,
      'biases': _biases(family, fields),
    }
  )


def _biases(family: Family, fields: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the linear layers that add a bias."""
  biases = [*family.traits.get('biases', ())]
  for field, names in family.bias_fields.items():
    biases += names if fields.get(field) else ()
  return tuple(biases)


def write_config(config: DecoderConfig) -> dict[str, Any]:
  """Returns the fields of a config.json that `transformers` loads."""
  family = FAMILIES[config.family]
  fields = {
    theirs: getattr(config, ours)
    for ours, theirs in {**_SIZES, **family.fields}.items()
  }
  fields |= {
    'architectures': [family.architecture],
    'hidden_act': family.needs['hidden_act'][0],
    'max_position_embeddings': config.max_positions,
    'model_type': config.family,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
  }
  if not config.learned_positions:  # GPT-2 has no such fields
    fields['head_dim'] = config.head_dim
    fields['num_key_value_heads'] = config.kv_heads
  for field, names in family.bias_fields.items():
    fields[field] = set(names) <= set(config.biases)
  fields |= hf_rope.write_rope(family, config)
  fields |= hf_layers.write_layers(family, config)
  own = _own_names(family)
  return {own.get(field, field): fields[field] for field in sorted(fields)}
