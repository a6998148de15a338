import io

import rich.console
import rich.text

from jlora.data.conversations import make_exchange
from jlora.data.report import (
  TRAINED,
  UNTRAINED,
  DataReport,
  colored,
  show_examples,
)
from jlora.data.tokens import tokenize

REPORT = DataReport(
  examples=1200,
  eval_examples=20,
  tokens=4000,
  trained_tokens=1000,
  packing_efficiency=0.9,
  cut=3,
  dropped=2,
  split=1,
  duplicates=7,
  notes=('rows.jsonl: read [so]',),
)


def test_trained_and_given_tokens_differ_in_style(tokenizer):
  text = colored(
    tokenize(make_exchange('hi [b]', 'yé'), tokenizer)[0], tokenizer
  )
  styles = {text.plain[s.start : s.end]: s.style for s in text.spans}
  given, trained, rest = styles
  assert given.endswith('hi [b]<|im_end|>\n<|im_start|>assistant\n')
  assert trained == 'yé<|im_end|>'
  assert rest == '\n'
  assert list(styles.values()) == [UNTRAINED, TRAINED, UNTRAINED]


def test_every_counter_is_said():
  said = '\n'.join(REPORT.lines())
  for part in (
    'read [so]',
    '1,200 examples, 4,000 tokens, 25.0% of them trained',
    '90.0% of the places',
    '20 held out; 7 more dropped',
    '3 cut',
    '2 dropped as too long',
    '1 texts split',
  ):
    assert part in said


def test_two_examples_and_the_counters_are_printed(tokenizer):
  file = io.StringIO()
  console = rich.console.Console(file=file, width=200)
  examples = [
    tokenize(make_exchange(q, 'the answer'), tokenizer)[0] for q in 'XYZ'
  ]
  show_examples(examples, tokenizer, REPORT, console)
  printed = file.getvalue()
  assert printed.count('the answer') == 2
  assert 'rows.jsonl: read [so]' in printed
  assert '1,200 examples' in printed
