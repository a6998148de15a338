"""Fields of config.json that say what its layers do differently."""

from collections.abc import Mapping, Sequence
from typing import Any

from jlora.errors import BaseModelError
from jlora.models.config import DecoderConfig
from jlora.models.family import Family

FIELDS = {
  'all': {'sliding_window'},
  'switched': {
    'layer_types',
    'sliding_window',
    'use_sliding_window',
  },
  'mixed': {
    'layer_types',
    'sliding_window',
    'sliding_window_pattern',
    'sliding_window_size',  # in old files, beside the one that counts
  },
  None: set(),
}  # that are read, by the `window` of a family
ROPE_FIELDS = {'no_rope_layer_interval', 'no_rope_layers'}
WHOLE, WINDOW = 'full_attention', 'sliding_attention'


def read_layers(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of DecoderConfig that name layers.

  Args:
    family: The model's.
    fields: Of config.json.

  Raises:
    BaseModelError: A field does not say something for every layer, or says
      something else than this decoder computes.
  """
  layers = fields['num_hidden_layers']
  window = _window(family, fields)
  unrotated = _unrotated(fields, layers) if family.skips_rope else ()
  local = _local_layers(family, fields, unrotated) if window else ()
  return {
    'sliding_window': window if local else None,
    'local_layers': local,
    'unrotated_layers': unrotated,
  }


def _window(family: Family, fields: Mapping[str, Any]) -> int | None:
  """Returns how many tokens a local layer sees; None if none is local."""
  if family.window is None:
    return None
  if family.window == 'switched' and not fields.get('use_sliding_window'):
    return None
  window = fields.get('sliding_window')
  if window is not None and not (type(window) is int and window > 0):
    raise BaseModelError(
      f'config.json has sliding_window={window!r}, which must be a positive'
      ' whole number or null'
    )
  return window


def _local_layers(
  family: Family, fields: Mapping[str, Any], unrotated: tuple[int, ...]
) -> tuple[int, ...]:
  """Returns the layers that see a window, where there is one."""
  layers = range(fields['num_hidden_layers'])
  if family.window == 'all':
    return tuple(layers)
  kinds = fields.get('layer_types')
  if kinds is not None:
    _check_length('layer_types', kinds, len(layers))
    if others := set(kinds) - {WHOLE, WINDOW}:
      raise BaseModelError(
        f'config.json has layer_types with {sorted(others)}, which this decoder'
        f' does not compute; it knows {WHOLE!r} and {WINDOW!r}'
      )
    return tuple(i for i in layers if kinds[i] == WINDOW)
  if family.window == 'mixed':
    period = _period('sliding_window_pattern', fields, family.period)
    return tuple(i for i in layers if (i + 1) % period)
  first = fields.get('max_window_layers', 0)
  return unrotated if family.skips_rope else tuple(layers[first:])


def _unrotated(fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
  """Returns the layers without rotary embeddings."""
  flags = fields.get('no_rope_layers')
  if flags is None:
    every = _period('no_rope_layer_interval', fields)
    return tuple(range(every - 1, layers, every))
  _check_length('no_rope_layers', flags, layers)
  return tuple(i for i in range(layers) if not flags[i])


def _period(
  field: str, fields: Mapping[str, Any], default: int | None = None
) -> int:
  value = fields.get(field)
  value = default if value is None else value
  if type(value) is not int or value < 1:
    raise BaseModelError(
      f'config.json has {field}={value!r}, which must be a positive whole'
      ' number'
    )
  return value


def _check_length(field: str, values: Sequence[Any], layers: int) -> None:
  if not isinstance(values, list | tuple) or len(values) != layers:
    raise BaseModelError(
      f'config.json has {field}={values!r}, which must be a list of'
      f' {layers}, one for each layer'
    )


def write_layers(family: Family, config: DecoderConfig) -> dict[str, Any]:
  """Returns the fields of config.json that say what `read_layers` reads."""
  layers = range(config.layers)
  fields: dict[str, Any] = {}
  if family.window:
    fields['sliding_window'] = config.sliding_window
  if family.window == 'mixed' and config.sliding_window is None:
    fields['sliding_window'] = config.max_positions  # transformers needs one
  if family.window in ('switched', 'mixed'):
    fields['layer_types'] = [
      WINDOW if i in config.local_layers else WHOLE for i in layers
    ]
  if family.window == 'switched':
    fields['use_sliding_window'] = config.sliding_window is not None
  if family.skips_rope:
    fields['no_rope_layers'] = [
      int(i not in config.unrotated_layers) for i in layers
    ]
  return fields
