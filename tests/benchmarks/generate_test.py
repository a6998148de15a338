"""The arms of generate.py, each with the weights that it is called after."""

import dataclasses

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks.arms import generate_ours
from experiments.benchmarks.harness import (
  generators,
  models,
  processes,
  results,
)
from experiments.benchmarks.harness.generation import Work

SIZES = {
  **dict.fromkeys(('embed', 'mlp'), 64),
  **dict.fromkeys(('layers', 'heads', 'kv_heads'), 1),
  'head_dim': 64,
  'vocab': 96,
}
SETTINGS = {'batch': 1, 'prompt': 4, 'new': 3, 'rank': 2}
RATES = {'dense': 4.0, 'nf4': 1.0, 'merged': 4.0, 'adapter': 2.0}


@pytest.fixture(scope='module')
def model():
  return models.Model(None, models.make_config(SIZES))


def pretend(arm, _):
  """Answers as an arm would whose speed depends on its weights alone."""
  rate = RATES[arm.work['kind']]
  return {'arm': arm.name, 'cold': True, 'tokens_per_s': rate}


def test_all_arms_are_beside_ours_on_dense_weights(
  tmp_path, monkeypatch, model
):
  monkeypatch.setattr(processes, 'run', pretend)
  out = tmp_path / 'result.json'
  with flagsaver.flagsaver():
    flags.FLAGS(['test', f'--out={out}', '--rounds=2'])
    generators.compare(SETTINGS, model, tmp_path / 'model')
  result = results.load(out)
  speeds = {
    arm: x['speed'] for arm, x in result['summary'].items() if arm != 'jlora'
  }
  assert speeds == {
    'jlora NF4 + adapter': 4.0,
    'jlora NF4 + adapter, merged': 1.0,
    'transformers': 1.0,
    'PEFT': 2.0,
    'PEFT + bitsandbytes NF4': 4.0,
  }
  assert len(result['records']) == 12
  assert result['failures'] == {}


@pytest.mark.parametrize(
  ('kind', 'lazy'), [('dense', False), ('nf4', True), ('merged', False)]
)
def test_ours_generates_from_the_weights_it_is_asked_for(
  tmp_path, monkeypatch, model, kind, lazy
):
  calls = []

  def generate(apply, params, config, prompts, sampling, **_):
    kernel = params['layers']['mlp']['up_proj']['kernel']
    calls.append((sampling.max_new_tokens, hasattr(kernel, 'a')))
    assert kernel.shape == (1, 64, 64)
    assert len(prompts) == 1

  monkeypatch.setattr(generate_ours, 'generate', generate)
  folder = tmp_path / 'model'
  model.write(folder)
  work = dataclasses.asdict(Work(kind=kind, folder=str(folder), **SETTINGS))
  figures = generate_ours.run(work)
  assert set(calls) == {(2, lazy), (3, lazy)}
  assert figures['tokens_per_s'] > 0
