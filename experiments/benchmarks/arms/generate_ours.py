"""jlora: dense weights, NF4 with an adapter, or that merged beforehand."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from experiments.benchmarks.harness import worker
from experiments.benchmarks.harness.generation import Work
from jlora.checkpoints.bases import open_base
from jlora.inference.plain import make_plain
from jlora.inference.sampler import generate
from jlora.inference.sampling import Sampling
from jlora.models import families
from jlora.models.decoder import Decoder


def run(work: Mapping[str, Any]) -> dict[str, Any]:
  """Times greedy generation.

  Args:
    work: Fields of `generation.Work`.
  """
  work = Work(**work)
  base = open_base(work.folder)
  params = jax.tree.map(jnp.asarray, base.load_params())
  apply = Decoder(base.config, dtype=jnp.float32).apply
  if work.kind != 'dense':
    spec = jlora.LoraSpec(rank=work.rank, alpha=2.0 * work.rank)
    spec = families.resolve(spec, base.config)
    quant = families.resolve(jlora.QuantSpec(), base.config)
    halves = jlora.partition(jax.random.key(0), params, spec, quant=quant)
    params, apply = jlora.combine(*halves, spec), jlora.lift(apply)
    del halves
  if work.kind == 'merged':
    params = make_plain(params, jnp.float32)
  prompts = list(work.prompts(base.config.vocab_size))

  def more(count: int) -> None:
    generate(
      apply,
      params,
      base.config,
      prompts,
      Sampling(max_new_tokens=count),
      eos_token_ids=(),
      batch_size=work.batch,
      dtype=jnp.float32,
    )

  return work.timed(more)


if __name__ == '__main__':
  worker.serve(run)
