"""Folders in 4 bits, their bytes made by bitsandbytes itself."""

import json
import shutil

import pytest

torch = pytest.importorskip('torch')
functional = pytest.importorskip('bitsandbytes.functional')
safetensors = pytest.importorskip('safetensors.torch')
load_file, save_file = safetensors.load_file, safetensors.save_file

FIELDS = {'quant_method': 'bitsandbytes', 'load_in_4bit': True}


def pack(name, weight, **changes):
  """Returns the tensors that bitsandbytes makes of a weight."""
  fields = {'quant_type': 'nf4', 'blocksize': 64, 'compress_statistics': True}
  fields |= {'quant_storage': torch.uint8, **changes}
  packed, state = functional.quantize_4bit(weight, **fields)
  parts = state.as_dict(packed=True)
  return {name: packed, **{f'{name}.{key}': x for key, x in parts.items()}}


def decode(tensors, name):
  """Returns the weight as float32, in the storage order of the format.

  Not bitsandbytes' own decoder: on CPUs it takes rows for a whole number of
  blocks, and is off where they are not.
  """
  parts = {k: v for k, v in tensors.items() if k.startswith(f'{name}.')}
  state = functional.QuantState.from_dict(parts, torch.device('cpu'))
  absmax = state.absmax
  if state.nested:
    absmax = functional.dequantize_blockwise(absmax, state.state2)
    absmax = absmax + state.offset
  packed = tensors[name].view(torch.uint8).flatten()
  codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
  size = len(codes)
  absmax = absmax.repeat_interleave(state.blocksize)[:size]
  return (state.code[codes] * absmax).reshape(state.shape).numpy()


def is_linear(name):
  return name.endswith('_proj.weight')


def write_packed(base, folder, choose=None, **changes):
  """Copies a folder with its linear layers in 4 bits; returns its tensors.

  Args:
    base: The folder.
    folder: The copy.
    choose: Name of a weight -> changes of its own, or None for as it is.
    changes: Arguments of `quantize_4bit` for all weights.
  """
  shutil.copytree(base, folder)
  tensors = load_file(folder / 'model.safetensors')
  for name, weight in list(tensors.items()):
    own = choose(name) if choose else ({} if is_linear(name) else None)
    if own is not None:
      tensors |= pack(name, weight, **{**changes, **own})
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  path = folder / 'config.json'
  fields = json.loads(path.read_text()) | {'quantization_config': FIELDS}
  path.write_text(json.dumps(fields))
  return tensors
