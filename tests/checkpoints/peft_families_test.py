"""PEFT adapters of every family, both ways."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.checkpoints.peft import load_adapter
from jlora.errors import AdapterError
from tests.decoders import (
  PATTERNS_OF_PARAMETERS,
  ROWS,
  assert_near,
  compiled,
  make_config,
  make_oracle,
  make_params,
)

TOKENS = np.arange(24).reshape(2, 12) * 5 % 96

pytestmark = [
  pytest.mark.filterwarnings('ignore:.*is deprecated:FutureWarning'),
  pytest.mark.filterwarnings('ignore:fan_in_fan_out is set to True'),
  pytest.mark.filterwarnings(PATTERNS_OF_PARAMETERS),
]

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')


def merged_logits(config, params, spec, trainable):
  frozen, _ = jlora.partition(jax.random.key(0), params, spec)
  merged = jlora.merge(frozen, trainable, spec)
  return np.asarray(compiled(config)({'params': merged}, jnp.asarray(TOKENS)))


def torch_logits(model):
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def expect_peft_agrees(adapted, folder):
  """Saves an adapter, compares PEFT's logits with ours, and saves it again."""
  adapted.save(folder)
  base = make_oracle(adapted.config, adapted.params)
  model = peft.PeftModel.from_pretrained(base, folder)
  expected = merged_logits(
    adapted.config, adapted.params, adapted.spec, adapted.trainable
  )
  assert_near(torch_logits(model), expected)
  adapted.expect_same_bytes_again(folder)


FULL = ('.*/(q|qkv)_proj/.*', '.*norm/(scale|bias)')


@pytest.mark.parametrize('full', [(), FULL])
def test_peft_computes_the_merged_logits(
  leaves_config, make_adapted, tmp_path, full
):
  fields = {'train_full': full, 'exclude': FULL[:1] if full else ()}
  adapted = make_adapted(config=leaves_config, targets='all-linear', **fields)
  expect_peft_agrees(adapted, tmp_path / 'adapter')


def test_logits_of_an_adapter_of_peft(leaves_config, tmp_path):
  params = make_params(leaves_config)
  base = make_oracle(leaves_config, params)
  moe, plain = leaves_config.experts > 0, leaves_config.family == 'gpt2'
  config = peft.LoraConfig(
    r=4,
    target_modules='all-linear',
    modules_to_save=['ln_f' if plain else 'norm', *([] if moe else ['mlp'])],
    fan_in_fan_out=plain,
  )
  model = peft.get_peft_model(base, config)
  torch.manual_seed(0)
  for name, value in model.named_parameters():
    if 'lora_B' in name or 'modules_to_save' in name:
      value.data += 0.1 * torch.randn_like(value)
  model.save_pretrained(tmp_path / 'adapter', save_embedding_layers=False)
  loaded = load_adapter(tmp_path / 'adapter', leaves_config)
  found = merged_logits(leaves_config, params, loaded.spec, loaded.trainable)
  assert_near(found, torch_logits(model))


METHODS = {
  'dora': {'variant': 'dora', 'scaling': 'rslora', 'targets': 'all-linear'},
  'embeddings': {'targets': ('embed/embedding', '.*/o_proj/kernel')},
  'rows': {'train_rows': {'embed/embedding': (3, 5)}, 'targets': 'attention'},
}
ONE_A_FAMILY = sorted({name.split()[0]: name for name in ROWS}.values())


CASES = [
  *((name, 'dora') for name in ONE_A_FAMILY),
  # Scaled, beside a table of positions, and apart from the head.
  *itertools.product(
    ('gemma2', 'gpt2', 'phi3 partly rotated'), ('embeddings', 'rows')
  ),
]


@pytest.mark.parametrize(('name', 'method'), CASES)
def test_peft_computes_other_methods(name, method, make_adapted, tmp_path):
  config = make_config(name)
  adapted = make_adapted(config=config, **METHODS[method])
  if method == 'dora' and config.experts:
    with pytest.raises(AdapterError, match='DoRA of experts'):
      adapted.save(tmp_path / 'adapter')
    return
  expect_peft_agrees(adapted, tmp_path / 'adapter')


def test_a_kernel_without_its_bias_is_refused(make_adapted, tmp_path):
  config = make_config('qwen2')
  adapted = make_adapted(
    config=config,
    train_full=('.*/q_proj/kernel',),
    targets=('.*/v_proj/kernel',),
  )
  with pytest.raises(AdapterError, match='train both, or neither'):
    adapted.save(tmp_path / 'adapter')
