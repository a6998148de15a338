"""What is refused before a base is read."""

import pytest

from jlora.core.lora import LoraSpec
from jlora.errors import AdapterError
from jlora.training.optimizers import OptimSpec
from jlora.training.requirements import resolve
from jlora.training.run_spec import (
  DataSpec,
  EvalSpec,
  LogSpec,
  MeshSpec,
  RunSpec,
  TrainSpec,
)
from tests.decoders import make_config

UP, ROUTER = 'layers/mlp/experts/up_proj/kernel', 'layers/mlp/router/kernel'


def make_spec(**fields):
  return RunSpec(
    base='unused',
    quant=None,
    lora=LoraSpec(rank=2, **fields),
    data=DataSpec(train='unused.jsonl', max_length=16),
    train=TrainSpec(batch_size=1, steps=1),
    optim=OptimSpec(),
    eval=EvalSpec(),
    mesh=MeshSpec(),
    log=LogSpec(),
  )


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'targets': 'all-linear', 'variant': 'dora'}, 'DoRA of experts'),
    ({'targets': (ROUTER,), 'variant': 'dora'}, 'or of their router'),
    ({'targets': 'attention', 'train_full': (UP,)}, 'no file for single'),
  ],
)
@pytest.mark.parametrize('family', ['mixtral', 'qwen3_moe'])
def test_an_adapter_that_could_not_be_written_is_not_trained(
  family, fields, named
):
  with pytest.raises(AdapterError, match=named):
    resolve(make_spec(**fields), make_config(family))


@pytest.mark.parametrize(
  'fields',
  [
    {'targets': 'attention', 'variant': 'dora', 'train_full': (ROUTER,)},
    {'targets': (), 'train_full': '.*'},
  ],
)
def test_what_can_be_written_is_trained(fields):
  config = make_config('mixtral')
  assert resolve(make_spec(**fields), config).lora.targets is not None
