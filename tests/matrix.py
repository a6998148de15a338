"""The README's table of families, made from the tests that hold its cells.

python -m tests.matrix
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
START, END = '<!-- families -->\n', '<!-- /families -->\n'

FAMILIES = {
  'llama': 'Llama 2, 3',
  'mistral': 'Mistral',
  'qwen2': 'Qwen2, 2.5',
  'qwen3': 'Qwen3',
  'smollm3': 'SmolLM3',
  'phi3': 'Phi-3, 4',
  'gemma2': 'Gemma 2',
  'gemma3_text': 'Gemma 3, text',
  'gpt2': 'GPT-2',
  'mixtral': 'Mixtral',
  'qwen3_moe': 'Qwen3-MoE',
}

_MODELS, _FILES = 'tests/models/', 'tests/checkpoints/'
_LIFTED = _MODELS + (
  'lifted_test.py::test_lifted_logits_and_gradients_are_the_merged'
)
_BNB = _FILES + 'bitsandbytes_families_test.py::test_'
# Column -> the test that holds it, and what a test's id must end in.
COLUMNS = {
  'logits': (_MODELS + 'transformers_test.py::test_logits', ''),
  'generate': (_MODELS + 'transformers_test.py::test_greedy_tokens', ''),
  'folder in': (
    _FILES + 'hf_families_test.py::test_a_folder_of_transformers_is_read',
    '',
  ),
  'folder out': (
    _FILES
    + 'hf_families_test.py'
    + '::test_transformers_computes_the_logits_of_a_folder_of_ours',
    '',
  ),
  'PEFT in': (
    _FILES + 'peft_families_test.py::test_logits_of_an_adapter_of_peft',
    '',
  ),
  'PEFT out': (
    _FILES + 'peft_families_test.py::test_peft_computes_the_merged_logits',
    '',
  ),
  '4 bits in': (_BNB + 'what_transformers_quantized_is_read_as_it_is', ''),
  '4 bits out': (_BNB + 'transformers_reads_the_codes_that_are_written', ''),
  'GGUF in, out': (
    _FILES + 'gguf_writer_test.py::test_what_is_read_again_is_what_was_written',
    '',
  ),
  'LoRA': (_LIFTED, '-lora'),
  'QLoRA': (_LIFTED, '-qlora'),
}
# Column -> another test that holds it.
OTHERS = {
  '4 bits in': _BNB + 'experts_with_codes_of_their_own_stay_as_they_are'
}
# Columns with a refusal that is tested.
REFUSALS = {
  '4 bits out': _BNB + 'experts_in_codes_have_no_form_in_bitsandbytes',
  'GGUF in, out': (
    _FILES + 'gguf_writer_test.py::test_what_gguf_cannot_express_is_refused'
  ),
}


def make_table() -> str:
  """Returns the table in Markdown: a row a family, a cell a kind of test."""
  tests = _collect()
  rows = [['', *COLUMNS], ['---', *[':-:'] * len(COLUMNS)]]
  for family, title in FAMILIES.items():
    cells = [_cell(column, family, tests) for column in COLUMNS]
    rows.append([f'{title} (`{family}`)', *cells])
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def _collect() -> list[str]:
  """Returns the names of all tests in the files of the columns."""
  names = [*(name for name, _ in COLUMNS.values()), *REFUSALS.values()]
  files = sorted({name.partition('::')[0] for name in names})
  command = [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-n0']
  ended = subprocess.run(
    [*command, '-p', 'no:cacheprovider', *files],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  if ended.returncode:
    raise RuntimeError((ended.stdout + ended.stderr)[-2000:])
  return ended.stdout.splitlines()


def _cell(column: str, family: str, tests: list[str]) -> str:
  """Returns a mark where a test of the family is in the column."""
  name, end = COLUMNS[column]
  row = rf'\[{family}( [^\]]*?)?(-[^\]]*)?'
  held = rf'{re.escape(name)}{row}{end}\]'
  if column in OTHERS:
    held += rf'|{re.escape(OTHERS[column])}{row}\]'
  if any(re.match(held, test) for test in tests):
    return '✓'
  refused = REFUSALS.get(column)
  if refused and any(
    re.match(rf'{re.escape(refused)}\w*{row}\]', test) for test in tests
  ):
    return 'refused'
  return ''


def main() -> None:
  """Writes the table into the README."""
  path = ROOT / 'README.md'
  before, rest = path.read_text().split(START)
  after = rest.split(END)[1]
  path.write_text(before + START + make_table() + END + after)


if __name__ == '__main__':
  main()
