import dataclasses

import pytest

from jlora import config
from jlora.comparison.flops import step_flops

ARMS = {
  'full': {'lora': {'targets': (), 'train_full': '.*'}},
  'lora': {},
  'qlora': {'quant': {}},
}


def flops(sizes, name, *, length=256, remat='full', layers=None, **train):
  spec = config.resolve(
    {
      'data': {'train': 'a.jsonl', 'max_length': length},
      'train': {'steps': 2, 'remat': remat, **train},
      **ARMS[name],
    }
  )
  decoder = dataclasses.replace(sizes, layers=layers or sizes.layers)
  return step_flops(spec, decoder)


@pytest.mark.parametrize('name', ARMS)
def test_every_layer_counts_alike(sizes, name):
  two, three, five = (
    flops(sizes['tiny'], name, length=16, layers=n) for n in (2, 3, 5)
  )
  assert five - three == pytest.approx(2 * (three - two), rel=1e-6)


def test_full_fine_tuning_takes_six_operations_a_weight_and_token(sizes):
  # Without recomputation: two forward, four backward; the head, whose logits
  # are formed again, takes eight. Attention and the rest come on top.
  c = sizes['smollm2']
  narrow = c.kv_heads * c.head_dim
  layer = c.embed_dim * (2 * c.embed_dim + 2 * narrow + 3 * c.mlp_dim)
  floor = 1024 * (6 * c.layers * layer + 8 * c.vocab_size * c.embed_dim)
  count = flops(c, 'full', remat='none')
  # Two products forward, five backward, without a quarter of the scores.
  attention = 7 * c.layers * 2 * 1024 * 192 * c.embed_dim
  assert floor + attention <= count <= 1.03 * (floor + attention)


@pytest.mark.parametrize(('remat', 'most'), [('none', 0.74), ('full', 0.80)])
def test_lora_saves_the_gradients_of_frozen_kernels(sizes, remat, most):
  count = {
    name: flops(sizes['smollm2'], name, remat=remat)
    for name in ('full', 'lora')
  }
  assert 0.5 < count['lora'] / count['full'] <= most


def test_decoding_weights_is_no_product(sizes):
  lora, qlora = (flops(sizes['smollm2'], name) for name in ('lora', 'qlora'))
  assert lora == qlora


def test_every_tile_of_a_long_sequence_counts(sizes):
  def layer(length):
    one, two = (
      flops(sizes['tiny'], 'lora', length=length, layers=n) for n in (1, 2)
    )
    return two - one

  # Linear layers grow as the length does; 3, 10 and 36 tiles of 256 tokens.
  short, middle, long = (layer(n) for n in (512, 1024, 2048))
  tiles = middle - 2 * short
  assert tiles > 0
  assert long - 2 * middle == 4 * tiles


def test_microbatches_do_not_hide_operations(sizes):
  whole, cut = (
    flops(sizes['tiny'], 'lora', length=16, accumulate=n) for n in (1, 4)
  )
  assert cut == whole
