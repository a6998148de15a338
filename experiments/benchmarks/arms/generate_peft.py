"""transformers' `generate`: dense weights, PEFT's adapter, or that on NF4."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from experiments.benchmarks.harness import worker
from experiments.benchmarks.harness.generation import Work


def run(work: Mapping[str, Any]) -> dict[str, Any]:
  """Times greedy generation.

  Args:
    work: Fields of `generation.Work`.
  """
  work = Work(**work)
  torch.set_num_threads(work.threads)
  quantization = None
  if work.kind == 'nf4':  # imported here: others are not charged for it
    from experiments.benchmarks.arms import peft as training_arm

    quantization = training_arm.quantization()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    work.folder,
    dtype=torch.float32,
    attn_implementation='sdpa',
    quantization_config=quantization,
  )
  if work.kind != 'dense':
    import peft

    model = peft.get_peft_model(
      model,
      peft.LoraConfig(
        r=work.rank,
        lora_alpha=2 * work.rank,
        target_modules='all-linear',
        task_type='CAUSAL_LM',
      ),
    )
  model.eval()
  tokens = torch.from_numpy(work.prompts(model.config.vocab_size))

  def more(count: int) -> None:
    model.generate(
      input_ids=tokens,
      attention_mask=torch.ones_like(tokens),
      max_new_tokens=count,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )

  return work.timed(more)


if __name__ == '__main__':
  worker.serve(run)
