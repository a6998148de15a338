"""Adapters as PEFT writes and reads them.

A pair's `a` [in, rank] is PEFT's `lora_A.weight` [rank, in], its `b` [rank,
out] is `lora_B.weight` [out, rank]; a stacked leaf is one module a layer.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from jlora.checkpoints import adapters, peft_config
from jlora.checkpoints.adapters import Adapter
from jlora.checkpoints.peft_modules import Modules
from jlora.checkpoints.peft_tensors import check_finite, load_tensors
from jlora.core import tree
from jlora.core.lora import LoraSpec
from jlora.errors import AdapterError
from jlora.models import families
from jlora.models.config import DecoderConfig
from jlora.models.families import Weight

_EMBEDDING, _HEAD = 'model.embed_tokens', 'lm_head'
_PARTS = {'a': 'lora_A.weight', 'b': 'lora_B.weight'}

Node = dict[str, np.ndarray]  # {'a': …, 'b': …} or {'full': …}


def save_adapter(
  folder: str | os.PathLike[str],
  trainable: Mapping[str, Any],
  spec: LoraSpec,
  config: DecoderConfig,
  *,
  base_name: str,
  metadata: Mapping[str, Any],
) -> None:
  """Writes an adapter that `peft.PeftModel.from_pretrained` opens.

  Low-rank pairs of linear layers become LoRA tensors, leaves that are trained
  whole become `modules_to_save`. The same input gives the same bytes.

  Args:
    folder: Created, or replaced as a whole if it holds an adapter.
    trainable: From `jlora.partition`, or what training made of it.
    spec: The one that `partition` had.
    config: The decoder's.
    base_name: Name of the base, as a user of PEFT would load it.
    metadata: Written to `jlora_metadata.json`, such as `base_sha256`.

  Raises:
    AdapterError: PEFT has no form for a leaf, a leaf does not fit the decoder
      or is not finite, or there is no low-rank pair at all.
    ConfigError: The folder holds other files than an adapter's.
    CheckpointError: The disk refused; the previous adapter is kept.
  """
  base = _modules(config)
  pairs, full = _leaves(trainable, config, spec.rank)
  if not pairs:
    raise AdapterError(
      f'none of the {len(full)} trained leaves is a low-rank pair, so there is'
      ' no adapter to write; export the whole model with --to=merged'
    )
  selection = peft_config.Selection(
    rank=spec.rank,
    alpha=spec.alpha,
    dropout=spec.dropout,
    targets=frozenset(m for w in pairs for m in w.modules),
    saved=frozenset(m for w in full for m in _holders(w, base)),
  )
  fields = peft_config.make_fields(selection, base, base_name)
  tensors: dict[str, np.ndarray] = {}
  for weight, node in pairs.items():
    tensors |= _pair_tensors(weight, node)
  for weight, node in full.items():
    tensors |= _full_tensors(weight, node, base)
  files = {
    adapters.CONFIG_FILE: adapters.to_json(fields),
    adapters.TENSORS_FILE: safetensors.numpy.save(tensors, {'format': 'pt'}),
  }
  adapters.write_files(folder, files, metadata)


def load_adapter(
  folder: str | os.PathLike[str], config: DecoderConfig
) -> Adapter:
  """Reads an adapter that PEFT or jlora wrote for a decoder.

  Args:
    folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
    config: The decoder's.

  Returns:
    The adapter. One with `use_rslora` gets the alpha that gives the same
    updates without.

  Raises:
    AdapterError: A file is missing or damaged, does not fit the decoder, or
      needs what this version does not compute.
  """
  folder = adapters.find_files(folder)
  metadata = adapters.load_metadata(folder)
  base = _modules(config)
  path = folder / adapters.CONFIG_FILE
  selection = peft_config.load_selection(path, base)
  weights = list(families.weights(config))
  pairs = [w for w in weights if _covers(selection.targets, w, path)]
  full = [w for w in weights if _covers(selection.saved, w, path)]
  tensors = load_tensors(
    folder / adapters.TENSORS_FILE,
    _shapes(pairs, full, selection.rank, base),
  )
  leaves = {w.path: _read_pair(w, tensors) for w in pairs}
  leaves |= {w.path: _read_full(w, tensors, base) for w in full}
  return Adapter(
    trainable=tree.nest(leaves),
    rank=selection.rank,
    alpha=selection.alpha,
    targets=tuple(w.path for w in pairs),
    train_full=tuple(w.path for w in full),
    dropout=selection.dropout,
    metadata=metadata,
  )


def _modules(config: DecoderConfig) -> Modules:
  weights = list(families.weights(config))
  return Modules(
    every=frozenset([*(m for w in weights for m in w.modules), _HEAD]),
    linear=frozenset(m for w in weights if w.transposed for m in w.modules),
    head=_HEAD,
    shared=frozenset([_EMBEDDING, _HEAD] if config.tie_embeddings else []),
    layers=config.layers,
  )


def _holders(weight: Weight, base: Modules) -> tuple[str, ...]:
  """Returns the modules that hold a leaf, the tied head among them."""
  if base.shared.intersection(weight.modules):
    return tuple(sorted(base.shared))
  return weight.modules


def _leaves(
  trainable: Mapping[str, Any], config: DecoderConfig, rank: int
) -> tuple[dict[Weight, Node], dict[Weight, Node]]:
  """Returns the low-rank pairs and the whole leaves, each of them checked."""
  nodes: dict[str, Node] = {}
  for path, leaf in tree.leaves_by_path(trainable).items():
    parent, _, name = path.rpartition('/')
    check_finite(path, np.asarray(leaf))
    nodes.setdefault(parent, {})[name] = np.asarray(leaf, np.float32)
  weights = {weight.path: weight for weight in families.weights(config)}
  pairs, full = {}, {}
  for path, node in nodes.items():
    if path not in weights:
      raise AdapterError(
        f'trainable has {path!r}, which is no leaf of the base'
      )
    _check_node(weights[path], node, rank)
    (full if 'full' in node else pairs)[weights[path]] = node
  return pairs, full


def _check_node(weight: Weight, node: Node, rank: int) -> None:
  found = {name: leaf.shape for name, leaf in node.items()}
  if 'full' in node:
    expected = {'full': weight.shape}
  elif weight.transposed:
    *stacked, size, out = weight.shape
    expected = {'a': (*stacked, size, rank), 'b': (*stacked, rank, out)}
  else:
    raise AdapterError(
      f'{weight.path!r} is no linear layer, and this version writes low-rank'
      ' pairs of linear layers only; train it with train_full'
    )
  if found != expected:
    raise AdapterError(
      f'trainable has {found} at {weight.path!r}; base and rank need {expected}'
    )


def _key(module: str, part: str) -> str:
  return f'base_model.model.{module}.{part}'


def _unstack(weight: Weight, leaf: np.ndarray) -> dict[str, np.ndarray]:
  """Returns one array a module."""
  arrays = leaf if weight.stacked else leaf[None]
  return dict(zip(weight.modules, arrays, strict=True))


def _stack(weight: Weight, arrays: list[np.ndarray]) -> np.ndarray:
  return np.stack(arrays) if weight.stacked else arrays[0]


def _pair_tensors(weight: Weight, node: Node) -> dict[str, np.ndarray]:
  tensors = {}
  for name, part in _PARTS.items():
    for module, matrix in _unstack(weight, node[name]).items():
      tensors[_key(module, part)] = np.ascontiguousarray(matrix.T)
  return tensors


def _full_tensors(
  weight: Weight, node: Node, base: Modules
) -> dict[str, np.ndarray]:
  tensors = {}
  for module, leaf in _unstack(weight, node['full']).items():
    leaf = np.ascontiguousarray(leaf.T if weight.transposed else leaf)
    names = base.shared if module in base.shared else {module}
    tensors |= {_key(name, 'weight'): leaf for name in names}
  return tensors


def _covers(chosen: frozenset[str], weight: Weight, path: pathlib.Path) -> bool:
  """Whether a leaf is chosen: all of its modules, or none."""
  missing = [module for module in weight.modules if module not in chosen]
  if missing and len(missing) < len(weight.modules):
    raise AdapterError(
      f'{path} leaves out {missing[0]!r}, but adapts the same module of other'
      ' layers; ranks that differ between layers are not in this version'
    )
  return not missing


def _shapes(
  pairs: list[Weight],
  full: list[Weight],
  rank: int,
  base: Modules,
) -> dict[str, tuple[int, ...]]:
  """Returns every key that the file must hold, with its shape."""
  shapes: dict[str, tuple[int, ...]] = {}
  for weight in pairs:
    size, out = weight.shape[-2:]
    for module in weight.modules:
      shapes[_key(module, _PARTS['a'])] = (rank, size)
      shapes[_key(module, _PARTS['b'])] = (out, rank)
  for weight in full:
    shape = weight.shape[1:] if weight.stacked else weight.shape
    shape = shape[::-1] if weight.transposed else shape
    for module in _holders(weight, base):
      shapes[_key(module, 'weight')] = shape
  return shapes


def _read_pair(weight: Weight, tensors: Mapping[str, np.ndarray]) -> Node:
  return {
    name: _stack(weight, [tensors[_key(m, part)].T for m in weight.modules])
    for name, part in _PARTS.items()
  }


def _read_full(
  weight: Weight, tensors: Mapping[str, np.ndarray], base: Modules
) -> Node:
  copies = [tensors[_key(m, 'weight')] for m in _holders(weight, base)]
  if base.shared.intersection(weight.modules):
    if not np.array_equal(*copies):
      raise AdapterError(
        f'the adapter has another {_HEAD} than {_EMBEDDING}, but this base has'
        ' one tensor for both (tie_word_embeddings)'
      )
    return {'full': copies[0]}
  copies = [copy.T if weight.transposed else copy for copy in copies]
  return {'full': _stack(weight, copies)}
