r"""QLoRA on SmolLM2-135M-Instruct: NF4 base, rank 16 on every linear layer.

python -m jlora.train --config=experiments/qlora.py
"""

from jlora.config import default_config, default_quant


def get_config():
  c = default_config()
  c.quant = default_quant()
  with c.unlocked():
    c.data.train = 'reasoning_gym:family_relationships'
    c.data.train_examples = 2000
    c.data.eval_examples = 200
    c.data.max_length = 256  # tokens a row
    c.train.batch_size = 4  # rows an update
    c.train.steps = 60
    c.optim.learning_rate = 1e-3
    c.optim.warmup = 5  # steps
  return c
