"""The parameters split into what is frozen and what is trained."""

import functools
from typing import Any

import jax

from jlora.core import tree
from jlora.core.lora import LoraSpec
from jlora.core.quantization import QuantSpec
from jlora.core.quantized import is_quantized
from jlora.core.split import make_split, split_leaf


def partition(
  key: jax.Array,
  params: tree.Params,
  spec: LoraSpec,
  *,
  quant: QuantSpec | None = None,
) -> tuple[Any, dict[str, Any]]:
  """Splits parameters into a frozen and a trainable tree.

  Args:
    key: PRNG key. Each leaf folds in its path, so another target does not
      change the adapters of the others.
    params: Tree of arrays, QuantizedArrays or ShapeDtypeStructs; with the
      last, the result holds ShapeDtypeStructs too. An init that changes the
      base needs dense kernels.
    spec: What is trained.
    quant: What of the frozen half is quantized, once the init had the dense
      kernels; None for plain LoRA. Leaves that are trained whole stay dense.

  Returns:
    `frozen`, shaped like `params` with a `Placeholder` where a leaf is trained
    whole, and `trainable`, a nested dict that holds, at the path of each
    target, `{'a': [..., in, rank], 'b': [..., rank, out]}`, with DoRA also
    `'magnitude': [..., out]`; `{'full': leaf}`; or `{'rows': [n, dim]}`. All of
    it is float32. With the inits 'lora' and 'gaussian', `b` is zero.

  Raises:
    ConfigError: A pattern matches nothing or the wrong kind of leaf, a rank
      exceeds its kernel, or nothing would be trained.
  """
  run = functools.partial(_partition, spec=spec, quant=quant)
  arrays = jax.tree.leaves(params)
  if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
    return jax.eval_shape(run, key, params)
  return run(key, params)


def _partition(
  key: jax.Array, params: tree.Params, spec: LoraSpec, quant: QuantSpec | None
) -> tuple[Any, dict[str, Any]]:
  leaves = tree.arrays_by_path(params, is_quantized)
  split = make_split(leaves, spec, quant)
  halves = {path: split_leaf(split, key, path, leaves[path]) for path in leaves}

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    name = tree.join(path)
    return halves[name].frozen if name in halves else leaf

  frozen = jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized)
  trained = {p: half.trained for p, half in halves.items() if half.trained}
  return frozen, tree.nest(trained)
