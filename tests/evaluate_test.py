import json
import shutil


def test_base_and_tuned_model_get_the_losses_of_the_run(commands, finished):
  run, _ = finished
  ended = commands.run('evaluate', f'--run={run}')
  assert (ended.rc, ended.stderr) == (0, '')
  scores = json.loads((run / 'evaluation.json').read_text())
  (run / 'evaluation.json').unlink()
  summary = json.loads((run / 'summary.json').read_text())
  for name in ('base', 'tuned'):
    loss = scores[name]['eval_loss']
    assert loss == summary[f'{name}_model']['eval_loss']
    assert f'{name}: eval_loss {loss:.4g}, perplexity' in ended.stdout


def test_answers_may_come_from_merged_weights(commands, finished, tmp_path):
  run = shutil.copytree(finished[0], tmp_path / 'run')
  config = json.loads((run / 'config.json').read_text())
  config['eval']['merge'] = True
  (run / 'config.json').write_text(json.dumps(config))
  ended = commands.run('evaluate', f'--run={run}')
  assert (ended.rc, ended.stderr) == (0, '')
  # Two layers of 64 wide, four bytes a weight.
  assert 'eval.merge: answers take 0.3 MB of merged weights' in ended.stdout
  tuned = json.loads((run / 'evaluation.json').read_text())['tuned']
  summary = json.loads((run / 'summary.json').read_text())
  assert tuned['eval_loss'] == summary['tuned_model']['eval_loss']


def test_a_folder_that_is_no_run_is_refused(commands, tmp_path):
  ended = commands.run('evaluate', f'--run={tmp_path}')
  assert ended.rc == 2
  assert ended.stderr.count('\n') == 1
  assert 'no config.json' in ended.stderr
