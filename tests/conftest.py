"""Settings of every test, and a tiny base and data for whole commands."""

import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')

import jax
import numpy as np
import pytest

from tests.decoders import family_config, leaves_config

__all__ = ['family_config', 'leaves_config']  # fixtures

jax.config.update('jax_numpy_rank_promotion', 'raise')

LONG = ('processes_test.py', 'sharded_test.py')  # beside those with commands
ROOT = pathlib.Path(__file__).parents[1]
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  '<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
  """Keeps together, on one of several workers, what shares a fixture.

  Files with commands go into one group, for they share a run and compiled
  programs; each of the others is its own.
  """
  shared = {item.path for item in items if 'commands' in item.fixturenames}
  # The longest first, so that no worker ends long before the other.
  items.sort(
    key=lambda item: (item.path not in shared, item.path.name not in LONG)
  )
  for item in items:
    group = 'commands' if item.path in shared else item.path.stem
    item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope='session')
def quick_jit():
  """`jax.jit` without XLA's optimizations, for what runs only once or twice."""
  options = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  }
  return functools.partial(jax.jit, compiler_options=options)


@pytest.fixture(scope='session')
def assert_near():
  """Checks each leaf within 1e-5 of its norm, which is 80 ulp of float32."""

  def check(mine, oracle):
    if oracle.dtype != jax.dtypes.float0:  # the gradient of ids
      assert np.any(oracle)
      difference = np.linalg.norm(np.asarray(mine) - np.asarray(oracle))
      assert difference <= 1e-5 * np.linalg.norm(oracle)

  return functools.partial(jax.tree.map, check)


@pytest.fixture(scope='session')
def sizes():
  """Decoders by name: two small layers, and SmolLM2-135M's sizes."""
  from jlora.models.config import DecoderConfig

  tiny = DecoderConfig(
    vocab_size=160,
    embed_dim=64,
    mlp_dim=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
  )
  smollm2 = DecoderConfig(
    vocab_size=49152,
    embed_dim=576,
    mlp_dim=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
  )
  return {'tiny': tiny, 'smollm2': smollm2}


@pytest.fixture(scope='session')
def tiny_base(tmp_path_factory):
  """A Hugging Face folder: two random layers and a byte-level tokenizer."""
  from jlora.checkpoints.model_folders import save_folder
  from jlora.core.tree import nest
  from jlora.models import layout
  from jlora.models.config import DecoderConfig

  config = DecoderConfig(
    vocab_size=320,
    embed_dim=64,
    mlp_dim=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    max_positions=256,
  )
  random = np.random.default_rng(0)
  leaves = {
    w.path: np.ones(w.shape, 'f4')
    if w.path.endswith('scale')
    else random.normal(0, 0.1, w.shape).astype('f4')
    for w in layout.weights(config)
  }
  folder = tmp_path_factory.mktemp('base') / 'tiny'
  save_folder(folder, config, nest(leaves), _make_tokenizer())
  return folder


def _make_tokenizer():
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(['user assistant what is the answer'] * 9, trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    chat_template=TEMPLATE,
    bos_token='<|endoftext|>',
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
  )


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
  """Forty sums as prompt and completion."""
  rows = [
    {'prompt': f'what is {i} + {j}?', 'completion': str(i + j)}
    for i in range(8)
    for j in range(5)
  ]
  path = tmp_path_factory.mktemp('data') / 'sums.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


@dataclasses.dataclass(frozen=True)
class Ended:
  """What a command left: exit code, both streams, and its seconds."""

  rc: int
  stdout: str
  stderr: str
  seconds: float


@dataclasses.dataclass(frozen=True)
class Commands:
  """Runs jlora's commands on the tiny base, each in a process of its own.

  Programs are compiled once for all of them.
  """

  flags: tuple[str, ...]
  cache: pathlib.Path

  def start(self, module, *flags, environment=None, **options):
    environment = {
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': str(self.cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONPATH': str(ROOT),
      'COLUMNS': '80',
      **(environment or {}),
    }
    return subprocess.Popen(
      [sys.executable, '-m', f'jlora.{module}', *map(str, flags)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
      **options,
    )

  def end(self, process, timeout=240):
    began = time.monotonic()
    try:
      stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      raise
    seconds = time.monotonic() - began
    return Ended(process.returncode, stdout, stderr, seconds)

  def run(self, module, *flags, **options):
    return self.end(self.start(module, *flags, **options))

  def start_training(self, workdir, *flags, experiment='qlora', **options):
    config = ROOT / 'experiments' / f'{experiment}.py'
    named = (f'--config={config}', f'--workdir={workdir}')
    return self.start('train', *named, *self.flags, *flags, **options)

  def train(self, workdir, *flags, **options):
    return self.end(self.start_training(workdir, *flags, **options))

  def start_together(self, count, workdir, *flags, devices=1):
    """Starts so many processes that train together on this machine."""
    with socket.socket() as free:
      free.bind(('localhost', 0))
      place = f'--coordinator=localhost:{free.getsockname()[1]}'
    force = f'--xla_force_host_platform_device_count={devices}'
    return [
      self.start_training(
        workdir,
        place,
        f'--processes={count}',
        f'--process={index}',
        *flags,
        environment={'XLA_FLAGS': force},
      )
      for index in range(count)
    ]

  def train_until(self, workdir, step, number):
    """Starts training and sends a signal once a step is in the metrics."""
    process = self.start_training(workdir)
    metrics = workdir / 'metrics.jsonl'
    while process.poll() is None:
      text = metrics.read_text() if metrics.exists() else ''
      if f'"step": {step},' in text:
        process.send_signal(number)
        break
      time.sleep(0.003)
    return self.end(process)


@pytest.fixture(scope='session')
def commands(tiny_base, tiny_data, tmp_path_factory):
  fields = {
    'base': tiny_base,
    'data.train': tiny_data,
    'data.max_length': 64,
    'train.steps': 120,
    'train.checkpoint_every': 25,
    'eval.every': 10,
    'eval.max_new_tokens': 4,
    'eval.samples': 2,
    'lora.alpha': 24.0,  # not the rank, and no multiple of it
    'optim.learning_rate': 1e-2,
  }
  flags = tuple(f'--config.{name}={value}' for name, value in fields.items())
  return Commands(flags, tmp_path_factory.mktemp('compiled'))


@pytest.fixture(scope='session')
def finished(commands, tmp_path_factory):
  """The folder of a QLoRA run that was never interrupted, and its output."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  ended = commands.train(workdir)
  assert ended.rc == 0, ended.stderr
  return workdir, ended
