"""Operations of a run's updates, against sums that are written out here."""

import dataclasses

import jax
import pytest

from jlora import LoraSpec, QuantSpec, partition
from jlora.core.tree import nest
from jlora.models import families, layout
from jlora.training.flops import count_work

KERNELS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
HEAD = 160 * 64
ADAPTERS = 4 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))


def work_of(config, *, quant=None, shape=(3, 16), peak=None, **fields):
  spec = families.resolve(LoraSpec(**({'rank': 4} | fields)), config)
  quant = quant and families.resolve(quant, config)
  params = nest(layout.shapes(config))
  _, trainable = partition(jax.random.key(0), params, spec, quant=quant)
  return count_work(config, trainable, shape=shape, hardware=7, peak=peak)


@pytest.mark.parametrize('quant', [None, QuantSpec()])
def test_a_frozen_weight_takes_four_operations_and_an_adapter_six(sizes, quant):
  work = work_of(sizes['tiny'], quant=quant)
  assert work.per_token == 4 * (KERNELS + HEAD) + 6 * ADAPTERS
  assert work.numerator == f'4 × {KERNELS + HEAD:,} + 6 × {ADAPTERS:,}'


def test_full_fine_tuning_takes_six_operations_a_weight(sizes):
  work = work_of(sizes['tiny'], targets=(), train_full='.*')
  assert work.per_token == 6 * (KERNELS + HEAD)
  assert work.numerator == f'6 × {KERNELS + HEAD:,}'
  assert next(work.rows())[0] == 'model FLOPs, 6 R a token'


def test_an_embedding_that_is_no_head_multiplies_nothing(sizes):
  untied = dataclasses.replace(sizes['tiny'], tie_embeddings=False)
  assert work_of(untied).per_token == work_of(sizes['tiny']).per_token


def test_of_experts_those_count_that_a_token_meets(sizes):
  some = dataclasses.replace(sizes['tiny'], experts=6, experts_per_token=2)
  all_of_two = dataclasses.replace(some, experts=2)
  router = 2 * 64 * (6 - 2)
  ours, theirs = (work_of(config) for config in (some, all_of_two))
  assert ours.frozen - theirs.frozen == router
  assert ours.trained == theirs.trained


def test_attention_grows_with_the_row_and_stops_at_a_window(sizes):
  config = sizes['tiny']
  assert work_of(config).attention == 12 * 2 * 64 * 16
  local = dataclasses.replace(config, sliding_window=5, local_layers=(1,))
  assert work_of(local).attention == 12 * 64 * (16 + 5)
  assert work_of(local, shape=(3, 4)).attention == 12 * 64 * (4 + 4)


def test_the_share_of_the_peak_is_that_of_the_models_operations(sizes):
  work = work_of(sizes['tiny'], peak=1e9)
  fields = work.fields(tokens_per_s=50.0)
  assert fields['model_per_s'] == 50 * work.per_token
  assert fields['mfu'] == fields['model_per_s'] / 1e9
  share = f'MFU {50 * work.per_token / 1e9:.1%} of the bfloat16 peak'
  assert work.sentence(50.0).endswith(share)


def test_without_a_known_peak_there_is_no_share(sizes):
  work = work_of(sizes['tiny'])
  assert work.fields(50.0)['mfu'] is None
  assert 'MFU' not in work.sentence(50.0)
  assert work.fields(None)['model_per_s'] is None
