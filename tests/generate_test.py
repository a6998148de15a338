import pytest

PROMPT = ('--prompt=what is 3 + 4?', '--max_new_tokens=6')


def test_a_run_and_its_adapter_on_the_base_say_the_same(
  commands, finished, tiny_base
):
  run, _ = finished
  named = commands.run('generate', f'--run={run}', *PROMPT)
  parts = (f'--base={tiny_base}', f'--adapter={run / "adapter"}')
  assert (named.rc, named.stderr) == (0, '')
  assert commands.run('generate', *parts, *PROMPT).stdout == named.stdout
  base = commands.run('generate', f'--base={tiny_base}', *PROMPT, '--merge')
  assert base.rc == 0
  assert 'all weights are plain float32 arrays already' in base.stderr
  assert base.stdout != named.stdout


def test_merged_before_the_first_token_it_says_the_same(commands, finished):
  run, _ = finished
  flags = (f'--run={run}', *PROMPT)
  merged = commands.run('generate', *flags, '--merge')
  assert merged.rc == 0
  assert merged.stdout == commands.run('generate', *flags).stdout
  assert merged.stderr == '--merge: forms 0.00 GiB of plain float32 arrays\n'


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (('--run=nowhere', '--prompt=a'), "'nowhere'"),
    (('--run=nowhere',), '--prompt is missing'),
    (('--prompt=a',), 'exactly one'),
    (('--run=a', '--prompt=a', '--temperature=-1'), '-1'),
    (('--base=no.gguf', '--prompt=a'), 'no.gguf'),
  ],
)
def test_wrong_flags_are_refused_in_one_line(commands, flags, part):
  ended = commands.run('generate', *flags)
  assert (ended.rc, ended.stdout) == (2, '')
  assert ended.stderr.count('\n') == 1
  assert part in ended.stderr


def test_an_adapter_of_another_base_is_refused(
  commands, finished, tmp_path, tiny_base
):
  import shutil

  other = shutil.copytree(tiny_base, tmp_path / 'other')
  weights = bytearray((other / 'model.safetensors').read_bytes())
  weights[-1] ^= 1
  (other / 'model.safetensors').write_bytes(weights)
  flags = (f'--base={other}', f'--adapter={finished[0] / "adapter"}', *PROMPT)
  ended = commands.run('generate', *flags)
  assert ended.rc == 2
  assert 'another' in ended.stderr
  assert commands.run('generate', *flags, '--allow_other_base').rc == 0
