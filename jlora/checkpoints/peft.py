"""Adapters as PEFT writes and reads them."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from jlora.checkpoints import adapters, mlx, peft_config
from jlora.checkpoints.adapters import Adapter
from jlora.checkpoints.peft_experts import (
  fuse_shapes,
  fuse_tensors,
  names_in_file,
  plan_fused,
  shared_pairs,
  split_selection,
  split_tensors,
)
from jlora.checkpoints.peft_fused import Fused
from jlora.checkpoints.peft_initial import (
  add_initial,
  only_pairs,
  take_initial,
  twice_the_rank,
)
from jlora.checkpoints.peft_layout import Layout, Node, Shapes
from jlora.checkpoints.peft_leaves import base_layouts, make_layouts
from jlora.checkpoints.peft_modules import Modules, make_modules
from jlora.checkpoints.peft_selection import Selection, select, spec_of
from jlora.checkpoints.peft_tensors import load_tensors
from jlora.checkpoints.starts import (
  Starts,
  first_pairs,
  load_starts,
  to_bytes,
)
from jlora.core import tree
from jlora.core.lora import LoraSpec
from jlora.errors import AdapterError, ConfigError
from jlora.models.config import DecoderConfig


def save_adapter(
  folder: str | os.PathLike[str],
  trainable: Mapping[str, Any],
  spec: LoraSpec,
  config: DecoderConfig,
  *,
  base_name: str,
  metadata: Mapping[str, Any],
  initial: Mapping[str, Any] | None = None,
  starts: Starts | None = None,
) -> None:
  """Writes an adapter that `peft.PeftModel.from_pretrained` opens.

  Low-rank pairs become LoRA tensors without their padding, leaves that are
  trained whole `modules_to_save`, and trained rows `trainable_token_indices`.
  An init that changed the base becomes plain LoRA of twice the rank on the
  base as it was. Pairs of experts and routers are fused as PEFT fuses them,
  which needs transformers 5 there; it knows no dropout of such pairs, so that
  adapter_config.json says 0 for all, and `jlora_metadata.json` what was
  trained with. The same input gives the same bytes.

  Args:
    folder: Created, or replaced as a whole if it holds an adapter.
    trainable: From `jlora.partition`, or what training made of it.
    spec: The one that `partition` had.
    config: The decoder's.
    base_name: Name of the base, as a user of PEFT would load it.
    metadata: Written to `jlora_metadata.json`, such as `base_sha256`, beside
      the fields of `spec` under `lora`.
    initial: The low-rank pairs of `trainable` before training; needed where
      the init changed the base and there is no `starts`, not used elsewhere.
    starts: How they started, by path, from `load_split`; with it, jlora takes
      the same part out of the base again where the init was LoftQ.

  Raises:
    AdapterError: PEFT has no form for a leaf, a leaf does not fit the decoder
      or is not finite, there is no low-rank pair at all, or `initial` is
      missing.
    ConfigError: The folder holds other files than an adapter's, or the spec
      does not fit the decoder.
    CheckpointError: The disk refused; the previous adapter is kept.
  """
  base, selection = make_modules(config), select(spec, config)
  layouts = make_layouts(selection, config, base)
  if not selection.pairs:
    raise AdapterError(
      f'none of the {len(layouts)} trained leaves is a low-rank pair, so there'
      ' is no adapter to write; export the whole model with --to=merged'
    )
  nodes = _nodes(trainable, layouts)
  if spec.changes_base:
    initial = initial or first_pairs(starts or {})
    if not initial:
      raise AdapterError(
        f'the init {spec.init!r} took a part of the base out, which the base'
        ' of a user of PEFT still has; pass initial=, the adapters before'
        ' training, and plain LoRA of twice the rank is written'
      )
    nodes = add_initial(layouts, nodes, _initial_nodes(initial, nodes, layouts))
    layouts = twice_the_rank(layouts)
    selection = selection.doubled()
  fused = plan_fused(selection, base)
  fields = peft_config.make_fields(selection, base, base_name, fused)
  written = (layout.write(nodes[path]) for path, layout in layouts.items())
  tensors = {key: tensor for part in written for key, tensor in part.items()}
  tensors = fuse_tensors(tensors, fused)
  names = names_in_file(tensors, base)
  tensors = {names.get(key, key): x for key, x in tensors.items()}
  files = {
    adapters.CONFIG_FILE: adapters.to_json(fields),
    adapters.TENSORS_FILE: safetensors.numpy.save(tensors, {'format': 'pt'}),
  }
  if spec.init == 'loftq' and starts:
    files[adapters.START_FILE] = to_bytes(starts)
  metadata = {'lora': dataclasses.asdict(spec), **metadata}
  adapters.write_files(folder, files, metadata)


def _nodes(
  trainable: Mapping[str, Any], layouts: Mapping[str, Layout]
) -> dict[str, Node]:
  """Returns the nodes of a tree by path, each of them checked."""
  arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), trainable)
  nodes = tree.nodes_by_path(arrays)
  for path in sorted(nodes.keys() ^ layouts.keys()):
    raise AdapterError(
      f'trainable has {path!r}, which the spec does not train in this base'
      if path in nodes
      else f'trainable lacks {path!r}, which the spec trains'
    )
  for path, layout in layouts.items():
    layout.check(nodes[path])
  return nodes


def _initial_nodes(
  initial: Mapping[str, Any],
  nodes: Mapping[str, Node],
  layouts: Mapping[str, Layout],
) -> dict[str, Node]:
  """Returns the nodes with the pairs before training in them."""
  pairs, began = only_pairs(layouts), tree.nodes_by_path(initial)
  found = {p: {**nodes[p], **began[p]} for p in pairs if p in began}
  return _nodes(tree.nest(found), pairs)


def load_adapter(
  folder: str | os.PathLike[str], config: DecoderConfig
) -> Adapter:
  """Reads an adapter that PEFT, jlora or mlx-lm wrote for a decoder.

  Args:
    folder: Holds `adapter_config.json` and `adapter_model.safetensors`, or
      `adapters.safetensors` of mlx-lm.
    config: The decoder's.

  Raises:
    AdapterError: A file is missing or damaged, does not fit the decoder, or
      needs what this version does not compute.
  """
  if mlx.is_mlx(folder):
    return mlx.load_mlx(folder, config)
  folder = adapters.find_files(folder)
  metadata = adapters.load_metadata(folder)
  base = make_modules(config)
  fields = folder / adapters.CONFIG_FILE
  selection = peft_config.load_selection(fields, base)
  fused = shared_pairs(peft_config.load_parameters(fields, base), base)
  layouts = make_layouts(selection, config, base)
  copies = base_layouts(layouts, base)
  tensors = _load_tensors(folder, layouts, copies, fused, base)
  if fused:
    trained = _trained(metadata, config)
    selection, fused = split_selection(selection, fused, tensors, trained, base)
    layouts = make_layouts(selection, config, base)
    tensors = split_tensors(tensors, fused)
  nodes = {path: layout.read(tensors) for path, layout in layouts.items()}
  start = folder / adapters.START_FILE
  return Adapter(
    trainable=tree.nest(nodes),
    spec=spec_of(selection, config),
    metadata=metadata,
    base_leaves={
      path: copy.read(tensors)['full']
      for path, copy in copies.items()
      if copy.tensor_shapes().keys() <= tensors.keys()
    },
    starts=load_starts(start) if start.is_file() else {},
  )


def _load_tensors(
  folder: pathlib.Path,
  layouts: Mapping[str, Layout],
  copies: Mapping[str, Layout],
  fused: Mapping[str, Fused],
  base: Modules,
) -> dict[str, np.ndarray]:
  """Returns the tensors of a file, checked; fused ones as they are."""
  shapes = fuse_shapes(_shapes(layouts), fused)
  names = {name: key for key, name in names_in_file(shapes, base).items()}
  path = folder / adapters.TENSORS_FILE
  return load_tensors(path, shapes, _shapes(copies), names)


def _trained(
  metadata: Mapping[str, Any], config: DecoderConfig
) -> Selection | None:
  """Returns what the files of an adapter were made of, if they say it."""
  if 'lora' not in metadata:
    return None
  try:
    spec = adapters.trained_spec(metadata)
    selection = select(spec, config)
  except (AdapterError, ConfigError):
    return None
  return selection.doubled() if spec.changes_base else selection


def _shapes(layouts: Mapping[str, Layout]) -> Shapes:
  found: dict[str, tuple[int, ...]] = {}
  for layout in layouts.values():
    found |= layout.tensor_shapes()
  return found


def split_initial(
  adapter: Adapter, config: DecoderConfig
) -> tuple[dict[str, Any], dict[str, Any], LoraSpec]:
  """Returns what `save_adapter` was given where the init changed the base.

  Args:
    adapter: From `load_adapter`; jlora wrote it.
    config: The decoder's.

  Returns:
    `trainable`, the pairs of `initial`, and `spec`, for the frozen parameters
    that `jlora.partition` makes with that spec.

  Raises:
    AdapterError: The init did not change the base, or jlora did not write it.
  """
  spec = adapters.trained_spec(adapter.metadata)
  if not spec.changes_base:
    raise AdapterError(
      f'the adapter started with init {spec.init!r}; only one with an init that'
      ' changed the base has initial adapters'
    )
  layouts = make_layouts(select(spec, config), config, make_modules(config))
  nodes = _nodes(adapter.trainable, twice_the_rank(layouts))
  trained, initial = take_initial(layouts, nodes)
  return tree.nest(trained), tree.nest(initial), spec
