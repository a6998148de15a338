"""The same adapter on the same batches, trained by PEFT and by jlora."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.checkpoints.peft import load_adapter
from jlora.data.batch import Batch
from jlora.models.decoder import Decoder
from jlora.models.families import FAMILIES
from jlora.training.optimizers import OptimSpec, make_optimizer
from jlora.training.step import make_loss
from tests.decoders import ROWS, make_config, make_oracle, make_params

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')

QUICK = ('llama', 'gpt2')  # all others are slow
NAMES = [
  pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
  for name in dict.fromkeys(row.split()[0] for row in ROWS)
]
STEPS = 5
OPTIM = OptimSpec(
  learning_rate=2e-3, schedule='constant', weight_decay=0.01, clip=0.5
)

pytestmark = [
  pytest.mark.filterwarnings('ignore:.*is deprecated:FutureWarning'),
  pytest.mark.filterwarnings('ignore:Could not find a config file:UserWarning'),
]


def tokens_of(config):
  """Returns rows of tokens for each step, each with its next ones."""
  rng = np.random.default_rng(1)
  return rng.integers(0, config.vocab_size, (STEPS, 2, 13))


def targets_of(config):
  """Returns what is adapted: all, but for experts.

  PEFT has one `a` for an expert's gate and up kernels together, which are two
  leaves here: each then learns an `a` of its own.
  """
  attention = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
  return attention if config.experts else 'all-linear'


def train_in_peft(model, batches):
  """Returns the loss of each step, before its update."""
  params = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    params, lr=OPTIM.learning_rate, weight_decay=OPTIM.weight_decay
  )
  losses = []
  for tokens in torch.tensor(batches):
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, OPTIM.clip)
    optimizer.step()
    losses.append(loss.item())
  return losses


def train_in_jlora(config, params, adapter, batches, jit):
  """Likewise."""
  frozen, _ = jlora.partition(jax.random.key(0), params, adapter.spec)
  loss_fn = make_loss(Decoder(config), adapter.spec, chunk=32, frozen_head=True)
  tx = make_optimizer(OPTIM, STEPS, adapter.trainable)

  @jit
  def step(trainable, opt_state, frozen, batch):
    def mean(trainable):
      loss, tokens = loss_fn(trainable, frozen, batch, None)
      return loss / tokens

    loss, grads = jax.value_and_grad(mean)(trainable)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, loss

  trainable, losses = adapter.trainable, []
  opt_state = tx.init(trainable)
  for tokens in jnp.asarray(batches, jnp.int32):
    shape = tokens[:, 1:].shape
    batch = Batch(
      tokens=tokens[:, :-1],
      targets=tokens[:, 1:],
      loss_mask=jnp.ones(shape, jnp.float32),
      segment_ids=jnp.ones(shape, jnp.int32),
      positions=jnp.broadcast_to(jnp.arange(shape[1]), shape),
    )
    trainable, opt_state, loss = step(trainable, opt_state, frozen, batch)
    losses.append(float(loss))
  return losses


@pytest.mark.parametrize('family', NAMES)
def test_five_steps_have_the_losses_of_peft(family, tmp_path, quick_jit):
  config = make_config(family)
  params = make_params(config)
  torch.manual_seed(0)
  model = peft.get_peft_model(
    make_oracle(config, params),
    peft.LoraConfig(
      r=4,
      lora_alpha=6,
      target_modules=targets_of(config),
      fan_in_fan_out=FAMILIES[family].plain,
    ),
  ).eval()
  model.save_pretrained(tmp_path / 'start')
  adapter = load_adapter(tmp_path / 'start', config)
  batches = tokens_of(config)
  theirs = train_in_peft(model, batches)
  mine = train_in_jlora(config, params, adapter, batches, quick_jit)
  np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
  model.save_pretrained(tmp_path / 'end')
  start, end = (
    jax.tree.leaves(load_adapter(tmp_path / x, config).trainable)
    for x in ('start', 'end')
  )
  assert all(np.any(a != b) for a, b in zip(start, end, strict=True))
