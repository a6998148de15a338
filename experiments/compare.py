r"""Full fine-tuning, LoRA and QLoRA of SmolLM2-135M-Instruct on equal budgets.

  python -m jlora.compare --config=experiments/compare.py --quick

One seed and 40 steps an arm: 9 min 39 s on two CPU cores. Without
--quick: three seeds, the steps of qlora.py, and step times from rounds in which
the arms take turns. A full fine-tuning leaves a model of 0.5 GB, and needs
1.6 GB more on disk while it runs.
"""

import ml_collections

from experiments import qlora


def get_config():
  c = ml_collections.ConfigDict()
  c.run = qlora.get_config()  # what the arms share: base, data, batch, schedule
  c.run.eval.every = 10  # steps; points of the loss curve
  c.run.train.checkpoint_every = 1000  # steps; more than there are

  # What each arm changes of `run`: as full.py, lora.py and qlora.py do.
  # The learning rate of QLoRA is the best that was tried for qlora.py. LoRA has
  # the same, and full fine-tuning a tenth, near which LoRA Without Regret
  # (Schulman et al., 2025) found its optimum. `grid` tunes each arm instead.
  c.arms = {
    'full': {
      'quant': None,
      'lora': {'targets': (), 'train_full': '.*'},
      'optim': {'learning_rate': 2e-4},
    },
    'lora': {'quant': None, 'optim': {'learning_rate': 2e-3}},
    'qlora': {'optim': {'learning_rate': 2e-3}},
  }
  c.seeds = (0, 1, 2)

  # Factors that each arm's learning rate is tried with, such as
  # (0.1, 0.3, 1.0, 3.0, 10.0); empty takes it as it is.
  c.grid = ()

  # Rounds in which the arms take turns, and the steps an arm and round; the
  # first step does not count.
  c.timing = {'rounds': 3, 'steps': 6}

  # What --quick changes of all this, where no flag sets it.
  c.quick = {
    'run': {
      'data': {'eval_examples': 100},
      'train': {'steps': 40},
      'eval': {'examples': 100},
    },
    'seeds': (0,),
    'grid': (),
    'timing': {'rounds': 0},
  }
  return c
