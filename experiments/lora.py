r"""LoRA on SmolLM2-135M-Instruct: as qlora.py, with the base in full precision.

python -m jlora.train --config=experiments/lora.py
"""

from experiments import qlora


def get_config():
  c = qlora.get_config()
  c.quant = None
  return c
