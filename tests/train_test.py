import json
import os
import re
import shutil
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jlora.checkpoints.run_folder import RunFolder

TIMING = {'step_seconds', 'tokens_per_s'}
CONTRACT = {
  'adapter',
  'best',
  'checkpoints',
  'config.json',
  'loss.png',
  'metrics.jsonl',
  'samples.md',
  'summary.json',
}
PLENTY = 10  # seconds; what can be known before loading takes one when quiet


def metrics_of(run):
  lines = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  return [{k: v for k, v in x.items() if k not in TIMING} for x in lines]


def read_metrics(run):
  path = run / 'metrics.jsonl'
  return path.read_text() if path.exists() else ''


def load_last_state(run):
  last = max((run / 'checkpoints').iterdir(), key=lambda path: int(path.name))
  with ocp.StandardCheckpointer() as checkpointer:
    return last.name, checkpointer.restore(last / 'state')


def assert_same_end(run, other):
  name = 'adapter/adapter_model.safetensors'
  assert (run / name).read_bytes() == (other / name).read_bytes()
  assert metrics_of(run) == metrics_of(other)
  (step, state), (other_step, other_state) = map(load_last_state, (run, other))
  assert step == other_step
  equal = ocp.tree.to_flat_dict(state), ocp.tree.to_flat_dict(other_state)
  assert equal[0].keys() == equal[1].keys()
  for path, leaf in equal[0].items():
    assert np.asarray(leaf).tobytes() == np.asarray(equal[1][path]).tobytes()


def assert_refused(ended, *parts):
  assert ended.rc == 2, ended.stderr
  assert ended.stderr.startswith('jlora: ')
  assert ended.stderr.count('\n') == 1
  for part in parts:
    assert part in ended.stderr


def test_the_run_folder_holds_the_contract(finished):
  run, _ = finished
  assert {path.name for path in run.iterdir()} - {'.lock'} == CONTRACT
  assert (run / 'loss.png').read_bytes().startswith(b'\x89PNG\r\n')
  for name in ('adapter', 'best'):
    assert (run / name / 'jlora_metadata.json').is_file()


def test_every_step_is_in_the_metrics_once(finished):
  lines = metrics_of(finished[0])
  trained = [x['step'] for x in lines if 'loss' in x]
  measured = [x['step'] for x in lines if 'eval_loss' in x]
  assert trained == list(range(1, 121))
  assert measured == list(range(0, 121, 10))
  assert {'step', 'loss', 'tokens', 'grad_norm', 'skipped'} <= lines[1].keys()


def test_training_lowers_the_held_out_loss(finished):
  summary = json.loads((finished[0] / 'summary.json').read_text())
  before = summary['base_model']['eval_loss']
  assert summary['tuned_model']['eval_loss'] < before - 0.5
  assert summary['best_eval_loss'] < before - 0.5


def test_the_summary_counts_what_was_trained(finished):
  summary = json.loads((finished[0] / 'summary.json').read_text())
  # Ranks of 16 on seven kernels of two layers; 64 wide, 128 in the MLP.
  attention = 2 * (64 + 64) + 2 * (64 + 32)
  assert summary['trainable_params'] == 2 * 16 * (attention + 3 * (64 + 128))
  assert summary['bytes']['trainable'] == 4 * summary['trainable_params']
  assert summary['steps'] == 120
  assert summary['skipped_updates'] == 0
  lines = metrics_of(finished[0])
  tokens = sum(line.get('tokens', 0) for line in lines)
  assert summary['trained_tokens'] == tokens


def test_the_summary_says_what_a_token_takes_and_how_fast_that_went(finished):
  summary = json.loads((finished[0] / 'summary.json').read_text())
  found = summary['flops']
  kernels = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 320 * 64
  model = 4 * kernels + 6 * summary['trainable_params']
  assert found['model_per_token'] == model
  assert found['model_per_s'] == model * summary['tokens_per_s']
  assert found['hardware_per_step'] > model * 4 * 64  # layers run again
  assert found['mfu'] is None  # of a CPU
  assert f'{summary["tokens_per_s"]:,.0f} tokens/s' in finished[1].stdout
  assert 'hardware FLOPs' in finished[1].stdout


def test_config_json_has_sorted_keys(finished):
  text = (finished[0] / 'config.json').read_text()
  fields = json.loads(text)
  assert text == json.dumps(fields, indent=2, sort_keys=True) + '\n'
  assert fields['lora']['alpha'] == 24.0


def test_samples_show_answers_before_and_after(finished):
  text = (finished[0] / 'samples.md').read_text()
  assert text.count('- before: `') == text.count('- after: `') == 2
  assert '> what is' in text


def test_what_is_printed_fits_a_terminal_and_nothing_goes_to_stderr(finished):
  ended = finished[1]
  assert ended.stderr == ''
  assert 'compiled peak' in ended.stdout
  lines = [x for x in ended.stdout.splitlines() if '/' not in x]
  assert max(map(len, lines)) <= 90


def test_a_checkpoint_holds_three_times_the_trainable_bytes(finished):
  run, _ = finished
  summary = json.loads((run / 'summary.json').read_text())
  for step in ('100', '120'):
    files = (run / 'checkpoints' / step).rglob('*')
    size = sum(path.stat().st_size for path in files if path.is_file())
    assert size <= 3.2 * summary['bytes']['trainable'] + (1 << 16)


@pytest.mark.slow
def test_a_streamed_run_continues_as_if_it_had_not_stopped(
  commands, tmp_path, tiny_data
):
  text = tmp_path / 'text.jsonl'
  text.write_text('{"text": "%s"}\n' % ('what is 3 + 4? ' * 40))
  sources = str({str(tiny_data): 3, str(text): 1})
  flags = (
    f'--config.data.train={sources}',
    '--config.data.eval=reasoning_gym:gcd',
    '--config.data.stream=True',
    '--config.data.shuffle_buffer=20',
    '--config.data.max_length=128',
    '--config.optim.schedule=constant',
    '--config.eval.examples=0',
    '--config.eval.samples=0',
  )
  run, whole = tmp_path / 'run', tmp_path / 'whole'
  for steps in (7, 20):
    ended = commands.train(run, *flags, f'--config.train.steps={steps}')
    assert (ended.rc, ended.stderr) == (0, '')
  assert 'continuing after step 7' in ended.stdout
  assert f'{text}: read ' in ended.stdout.replace('\n', '')
  straight = commands.train(whole, *flags, '--config.train.steps=20')
  assert straight.rc == 0
  losses = [
    {x['step']: x['loss'] for x in metrics_of(path) if 'loss' in x}
    for path in (run, whole)
  ]
  assert losses[0] == losses[1]
  name = 'adapter/adapter_model.safetensors'
  assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize('experiment', ['lora', 'full'])
def test_every_experiment_runs_two_steps(commands, tmp_path, experiment):
  run = tmp_path / 'run'
  ended = commands.train(run, '--config.train.steps=2', experiment=experiment)
  assert (ended.rc, ended.stderr) == (0, '')
  names = {path.name for path in run.iterdir()} - {'.lock'}
  if experiment == 'full':
    assert names == CONTRACT - {'adapter', 'best'} | {'model'}
  else:
    assert names == CONTRACT


def test_methods_are_flags_of_one_run(commands, tmp_path):
  run = tmp_path / 'run'
  ended = commands.train(
    run,
    '--config.train.steps=2',
    '--config.lora.variant=dora',
    '--config.lora.scaling=rslora',
    '--config.lora.dropout=0.1',
    '--config.optim.lora_plus=16',
    "--config.lora.rank_pattern={'layers/1/.*': 4}",
    '--config.lora.train_full=.*norm/scale',
    "--config.lora.train_rows={'embed/embedding': [1, 2]}",
  )
  assert (ended.rc, ended.stderr) == (0, '')
  for part in ('rank 4-16', "train_full '.*norm/scale'", '2 rows'):
    assert part in ended.stdout
  summary = json.loads((run / 'summary.json').read_text())
  sides = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
  magnitudes = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
  norms, rows = 5 * 64, 2 * 64
  expected = (16 + 4) * sides + magnitudes + norms + rows
  assert summary['trainable_params'] == expected


@pytest.mark.slow
def test_an_init_that_changes_the_base_is_the_same_in_every_process(
  commands, tmp_path
):
  run, written = tmp_path / 'run', tmp_path / 'peft'
  flags = (
    '--config.lora.init=pissa',
    '--config.lora.variant=dora',
    '--config.train.steps=2',
  )
  ended = commands.train(run, *flags)
  assert (ended.rc, ended.stderr) == (0, '')
  assert commands.run('evaluate', f'--run={run}').rc == 0
  scores = json.loads((run / 'evaluation.json').read_text())
  summary = json.loads((run / 'summary.json').read_text())
  for name in ('base', 'tuned'):
    loss = summary[f'{name}_model']['eval_loss']
    assert scores[name]['eval_loss'] == loss
  ended = commands.run(
    'export', f'--run={run}', '--to=peft', f'--out={written}'
  )
  assert (ended.rc, ended.stderr) == (0, '')
  name = 'adapter_model.safetensors'
  assert (written / name).read_bytes() == (run / 'adapter' / name).read_bytes()


def test_a_signal_stops_after_a_checkpoint_and_the_same_command_continues(
  commands, finished, tmp_path
):
  run = tmp_path / 'run'
  stopped = commands.train_until(run, 3, signal.SIGINT)
  assert (stopped.rc, stopped.stderr) == (75, '')
  step, _ = load_last_state(run)
  assert metrics_of(run)[-1]['step'] == int(step) < 120
  continued = commands.train(run)
  assert (continued.rc, continued.stderr) == (0, '')
  assert f'continuing after step {step}' in continued.stdout
  assert_same_end(run, finished[0])


def test_a_killed_run_continues_as_if_it_had_not_been(
  commands, finished, tmp_path
):
  run = tmp_path / 'run'
  killed = commands.train_until(run, 31, signal.SIGKILL)
  assert killed.rc == -signal.SIGKILL
  assert load_last_state(run)[0] in ('25', '50', '75', '100')
  ended = commands.train(run, '--profile')  # which changes nothing
  assert ended.rc == 0, ended.stderr
  assert_same_end(run, finished[0])
  assert 'traced steps' in ended.stdout
  assert list(run.glob('profile/plugins/profile/*/perfetto_trace.json.gz'))


def test_a_profile_that_is_no_yes_or_no_is_refused(commands, tmp_path):
  assert_refused(commands.train(tmp_path, '--profile=5'), '--profile=5')


SHORT = (
  '--config.optim.schedule=constant',
  '--config.optim.warmup=0',
  '--config.quant.block_size=16',
  '--config.eval.examples=2',
)


def test_a_run_goes_on_with_fewer_devices_as_on_one(commands, tmp_path):
  def train(name, devices, steps, *mesh, processes=1):
    ended = [
      commands.end(process)
      for process in commands.start_together(
        processes,
        tmp_path / name,
        f'--config.train.steps={steps}',
        *SHORT,
        *(f'--config.mesh.{axis}' for axis in mesh),
        devices=devices // processes,
      )
    ]
    assert [process.rc for process in ended] == [0] * processes, ended
    return ended[0].stdout

  begun = train('moved', 8, 2, 'fsdp=2', 'tensor=4')
  assert 'parameters over 8 devices: data 1, fsdp 2, tensor 4' in begun
  assert re.search('mlp/up_proj/kernel +2 × 64/fsdp × 128/tensor', begun)
  continued = train('moved', 2, 4, 'fsdp=2', processes=2)
  assert 'continuing after step 2' in continued
  assert 'parameters over 2 devices: data 1, fsdp 2, tensor 1' in continued
  ended = train('moved', 1, 6)
  assert 'continuing after step 4' in ended
  assert 'parameters over' not in ended
  train('one', 1, 6)
  moved, one = (
    load_file(tmp_path / name / 'adapter' / 'adapter_model.safetensors')
    for name in ('moved', 'one')
  )
  assert moved.keys() == one.keys()
  for path, leaf in one.items():
    difference = np.linalg.norm(moved[path] - leaf)
    assert difference <= 1e-4 * np.linalg.norm(leaf), path
  losses, expected = (
    {x['step']: x['loss'] for x in metrics_of(tmp_path / name) if 'loss' in x}
    for name in ('moved', 'one')
  )
  assert list(losses) == list(range(1, 7))
  assert losses == pytest.approx(expected, rel=1e-4)


def test_of_two_processes_none_goes_on_alone(commands, tmp_path):
  run = tmp_path / 'run'
  flags = ('--config.train.steps=100000', '--config.train.checkpoint_every=1')

  def start():
    return commands.start_together(
      2, run, *flags, *SHORT, '--config.mesh.fsdp=2'
    )

  def wait_for_step(step, started):
    while f'"step": {step},' not in read_metrics(run):
      assert [process.poll() for process in started] == [None, None]
      time.sleep(0.05)

  first, second = start()
  wait_for_step(2, (first, second))
  second.kill()
  ended = commands.end(first, timeout=60)
  assert ended.rc != 0
  assert 'process' in ended.stderr
  commands.end(second)

  names = [path.name for path in (run / 'checkpoints').iterdir()]
  last = max(int(name) for name in names if name.isdigit())  # all are whole
  started = start()
  wait_for_step(last + 2, started)
  started[1].send_signal(signal.SIGTERM)
  ended = [commands.end(process, timeout=60) for process in started]
  assert [process.rc for process in ended] == [75, 75]
  assert f'continuing after step {last}' in ended[0].stdout


def test_a_finished_run_is_left_as_it_is(commands, finished):
  run, _ = finished
  times = {path: path.stat().st_mtime_ns for path in run.rglob('*.*')}
  ended = commands.train(run)
  assert (ended.rc, ended.stderr) == (0, '')
  assert 'complete; nothing to do' in ended.stdout
  assert times == {path: path.stat().st_mtime_ns for path in run.rglob('*.*')}


def test_another_config_in_the_same_folder_is_refused(commands, finished):
  ended = commands.train(finished[0], '--config.lora.rank=8')
  assert_refused(ended, 'lora.rank=16', '8', 'another --workdir')


def test_only_one_process_trains_in_a_folder(commands, tmp_path):
  with RunFolder(tmp_path / 'run'):
    ended = commands.train(tmp_path / 'run')
  assert_refused(ended, 'another process', str(tmp_path / 'run'))


def test_damaged_checkpoints_never_start_from_zero(
  commands, finished, tmp_path
):
  run = shutil.copytree(finished[0], tmp_path / 'run')
  for path in (run / 'checkpoints').rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  ended = commands.train(run, '--config.train.steps=130')
  assert (ended.rc, ended.stderr.count('\n')) == (3, 1), ended.stderr
  assert 'no checkpoint' in ended.stderr


@pytest.mark.parametrize(
  ('flag', 'parts'),
  [
    ('--config.lora.rnk=8', ["'rnk'", "'rank'"]),
    ('--config.lora.rank=0', ['0', '1 or more']),
    ('--config.lora.rank=abc', ["'abc'", 'int']),
    ('--config.train.remat=3', ["'3'", 'full']),
    ('--config.data.pack=7', ["'7'", 'bool']),
    ('--config.seed=-1', ['-1']),
    ('--config.mesh=7', ["'7'", 'section']),
    ('--config.data.train=no.jsonl', ['no.jsonl', 'does not exist']),
    ('--config.base=no.gguf', ['no.gguf', 'does not exist']),
    ('--nope=3', ["'nope'", '--help']),
    ('nope', ["'nope'", '--help']),
  ],
)
def test_what_is_known_before_loading_is_refused_at_once(
  commands, tmp_path, flag, parts
):
  ended = commands.train(tmp_path / 'run', flag)
  assert_refused(ended, *parts)
  assert ended.stdout == ''
  assert ended.seconds < PLENTY
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flag', 'parts'),
  [
    ('--config.lora.rank=500', ['500', 'at most 32']),
    ('--config.lora.targets=.*/nope', ['.*/nope']),
    ('--config.data.max_length=999', ['999', '256']),
  ],
)
def test_what_does_not_fit_the_base_leaves_no_folder(
  commands, tmp_path, flag, parts
):
  assert_refused(commands.train(tmp_path / 'run', flag), *parts)
  assert not (tmp_path / 'run').exists()


def test_sources_and_columns_are_read_from_flags(commands, tmp_path, tiny_data):
  table = tmp_path / 'sums.csv'
  table.write_text('question,answer\nwhat is 1 + 1?,2\nwhat is 1 + 2?,\n')
  sources = {str(table): 1, str(tiny_data): 3}
  columns = {str(table): {'prompt': 'question', 'completion': 'answer'}}
  ended = commands.train(
    tmp_path / 'run',
    f'--config.data.train={sources}',
    f'--config.data.columns={columns}',
  )
  assert_refused(ended, f"{table}:3: 'completion' is ''")


def test_a_malformed_line_is_named_with_its_file(commands, tmp_path, tiny_data):
  data = tmp_path / 'bad.jsonl'
  data.write_text(tiny_data.read_text() + '{"prompt": \n')
  ended = commands.train(tmp_path / 'run', f'--config.data.train={data}')
  assert_refused(ended, f'{data}:41: ')
  assert not (tmp_path / 'run').exists()


def test_a_pickled_base_is_refused(commands, tmp_path, tiny_base):
  base = shutil.copytree(tiny_base, tmp_path / 'pickled')
  (base / 'model.safetensors').rename(base / 'pytorch_model.bin')
  ended = commands.train(tmp_path / 'run', f'--config.base={base}')
  assert_refused(ended, 'pytorch_model.bin', 'pickle')
  assert ended.seconds < PLENTY


EXPERIMENT = """
from experiments import qlora
def get_config():
  c = qlora.get_config()
  with c.unlocked():
    {}
  return c
"""


@pytest.mark.parametrize(
  ('text', 'parts'),
  [
    (None, ['experiment.py', 'experiments/qlora.py']),
    (EXPERIMENT.format('c.lora.rnk = 3'), ["'rnk'", "'rank'"]),
    (EXPERIMENT.format('c.lora = 3'), ['line 6', 'lora']),
    (EXPERIMENT.format('c.train.steps = 1 / 0'), ['line 6', 'ZeroDivision']),
    ('def get_config()', ['line 1', 'SyntaxError']),
  ],
  ids=['missing', 'field', 'section', 'raises', 'syntax'],
)
def test_a_wrong_experiment_is_refused(commands, tmp_path, text, parts):
  path = tmp_path / 'experiment.py'
  if text is not None:
    path.write_text(text)
  run = tmp_path / 'run'
  assert_refused(
    commands.run('train', f'--config={path}', f'--workdir={run}'), *parts
  )
  assert not run.exists()
