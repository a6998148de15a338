"""The trees of `model.py`, read from a Hugging Face folder of a Llama."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from experiments.benchmarks.bare.linear import pack
from experiments.benchmarks.bare.model import KERNELS, Sizes


def read_sizes(folder: pathlib.Path, scale: float, remat: str) -> Sizes:
  """Returns what config.json says.

  Args:
    folder: Holds it.
    scale: Of the adapters.
    remat: As in `Sizes`.
  """
  fields = json.loads((folder / 'config.json').read_text())
  rope = fields.get('rope_parameters') or fields
  return Sizes(
    heads=fields['num_attention_heads'],
    kv_heads=fields['num_key_value_heads'],
    theta=rope['rope_theta'],
    eps=fields['rms_norm_eps'],
    scale=scale,
    remat=remat,
  )


def read_frozen(folder: pathlib.Path, *, packed: bool) -> dict[str, Any]:
  """Returns the frozen tree, read one kernel of one layer at a time.

  Args:
    folder: Holds model.safetensors, and a head that is the embedding.
    packed: Whether the kernels are NF4.
  """
  fields = json.loads((folder / 'config.json').read_text())
  layers = range(fields['num_hidden_layers'])
  with safetensors.safe_open(folder / 'model.safetensors', 'numpy') as file:
    read = file.get_tensor

    def stack(module: str, change: Callable[[np.ndarray], Any]) -> Any:
      name = f'model.layers.{{}}.{module}.weight'
      parts = [change(read(name.format(i))) for i in layers]
      return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *parts)

    def kernel(weight: np.ndarray) -> Any:
      return pack(weight.T) if packed else weight.T

    return {
      'embedding': jnp.asarray(read('model.embed_tokens.weight')),
      'final_norm': jnp.asarray(read('model.norm.weight')),
      'norms': {
        'attention': stack('input_layernorm', np.asarray),
        'mlp': stack('post_attention_layernorm', np.asarray),
      },
      'kernels': {name: stack(at, kernel) for name, at in KERNELS.items()},
    }


def make_adapters(frozen: Any, rank: int) -> dict[str, Any]:
  """Returns adapters as PEFT starts them: `a` uniform, `b` zero.

  Args:
    frozen: From `read_frozen`.
    rank: Of all of them.
  """
  found = {}
  for number, (name, kernel) in enumerate(frozen['kernels'].items()):
    codes = kernel if isinstance(kernel, jax.Array) else kernel.codes
    layers, rows, columns = codes.shape
    rows *= 1 if isinstance(kernel, jax.Array) else 2
    shape, bound = (layers, rows, rank), rows**-0.5
    key = jax.random.key(number)
    a = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    found[name] = (a, jnp.zeros((layers, rank, columns)))
  return found
