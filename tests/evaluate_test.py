import json


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


def test_a_folder_that_is_no_run_is_refused(commands, tmp_path):
  ended = commands.run('evaluate', f'--run={tmp_path}')
  assert ended.rc == 2
  assert ended.stderr.count('\n') == 1
  assert 'no config.json' in ended.stderr
