"""PEFT on transformers' model, with bitsandbytes' NF4 for QLoRA."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import torch
import transformers

from experiments.benchmarks.harness import training, worker

IGNORED = -100  # a target that is not learned
MODULES = [
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
]


def run(work: Mapping[str, Any]) -> dict[str, Any]:
  """Times the step.

  Args:
    work: Fields of `training.Work`.
  """
  work = training.Work(**work)
  model, optimizer = make_model(work)
  batches = work.batches()

  def advance(number: int) -> float:
    inputs = make_inputs(batches[number], padded=work.data == 'padded')
    return update(model(**inputs, use_cache=False).loss, optimizer)

  return work.timed(advance, batches)


def make_inputs(fields: training.Fields, *, padded: bool) -> dict[str, Any]:
  """Returns what the model is called with.

  Segments that share a row are told from each other by positions, without a
  mask: transformers then sees where they begin again.

  Args:
    fields: From `training.Work.batches`.
    padded: Whether each row is one segment with padding behind it.
  """
  targets = np.where(fields['loss_mask'] > 0, fields['targets'], IGNORED)
  found = {
    'input_ids': fields['tokens'],
    'labels': targets,
    'shift_labels': targets,
  }
  if padded:
    found['attention_mask'] = fields['segment_ids'] > 0
  elif 'positions' in fields:
    found['position_ids'] = fields['positions']
  return {name: torch.from_numpy(x).long() for name, x in found.items()}


def make_model(work: training.Work) -> tuple[Any, torch.optim.Optimizer]:
  """Returns the model with its adapters, and AdamW over these.

  Args:
    work: What the arm is asked for; 'full' is gradient checkpointing.
  """
  torch.set_num_threads(work.threads)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    work.folder,
    dtype=torch.float32,
    attn_implementation='sdpa',
    quantization_config=quantization() if work.quantized else None,
  )
  checkpointing = work.remat == 'full'
  options = {'use_reentrant': False}
  if work.quantized:
    model = peft.prepare_model_for_kbit_training(
      model,
      use_gradient_checkpointing=checkpointing,
      gradient_checkpointing_kwargs=options,
    )
  elif checkpointing:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
  model = peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=work.rank,
      lora_alpha=work.alpha,
      target_modules=MODULES,
      task_type='CAUSAL_LM',
    ),
  )
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    trained, lr=training.LEARNING_RATE, weight_decay=0.0
  )
  return model, optimizer


def update(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
  """Descends a loss and returns it.

  Args:
    loss: Of a batch.
    optimizer: From `make_model`.
  """
  loss.backward()
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  return loss.item()


def quantization() -> transformers.BitsAndBytesConfig:
  """Returns how bitsandbytes quantizes: NF4 with double quantization."""
  import bitsandbytes  # noqa: F401, so that it is missed by its name

  return transformers.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type='nf4',
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
  )


if __name__ == '__main__':
  worker.serve(run)
