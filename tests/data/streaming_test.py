import json

import datasets
import pytest

from jlora.data.recipe import Recipe
from jlora.data.streaming import prepare_stream
from jlora.errors import DataError


@pytest.fixture
def prepare(tokenizer):
  def stream(sources, held_out=None, max_length=99, **options):
    sources = [(sources, None)] if isinstance(sources, str) else sources
    recipe = Recipe(tokenizer=tokenizer, max_length=max_length)
    options = {'batch_size': 2, 'buffer': 8, 'eval_examples': 3} | options
    return prepare_stream(sources, held_out, recipe, **options)

  return stream


def rows(*questions):
  return [
    json.dumps({'prompt': q, 'completion': 'the answer'}) for q in questions
  ]


def prompts(conversations):
  return [c.messages[-2].content for c in conversations]


def test_the_first_rows_are_held_out_and_never_trained(
  prepare, write, tokenizer
):
  path = write(*rows(*'abcdefg'), *rows('b'))
  data = prepare(path)
  assert prompts(data.eval_conversations) == [*'abc']
  assert len(data.train) == data.report.examples == 8
  texts = [tokenizer.decode(e.tokens) for e in data.train]
  asked = [t.split('user\n')[1].split('<')[0] for t in texts]
  assert asked == [*'defgdefg']
  said = '\n'.join(data.report.lines())
  assert f'{path}: streamed, 100.0% of the examples' in said
  assert 'its first 3 rows are held out' in said
  assert 'the first 8 examples' in said
  assert '1 rows with a prompt that is held out are left out' in said


def test_only_what_is_needed_is_read(prepare, write):
  path = write(*rows(*'abcdefghijklmn'), 'not json')
  data = prepare(path)
  with pytest.raises(DataError, match=r':15: not JSON'):
    data.order.batch(10)


def test_held_out_data_may_be_named_or_lie_in_the_folder(
  prepare, write, tmp_path
):
  train = write(*rows(*'abcde'), name='train.jsonl')
  held = write(*rows(*'vwxyz'), name='valid.jsonl')
  for data in (prepare(train, held), prepare(str(tmp_path))):
    assert prompts(data.eval_conversations) == [*'vwx']
    assert len({e.tokens.tobytes() for e in data.train}) == 5


def test_a_streamed_task_needs_no_number_of_examples(prepare):
  data = prepare('reasoning_gym:gcd', max_length=256)
  assert len(data.eval_conversations) == 3
  assert data.score is not None


def test_shares_are_said(prepare, write):
  a = write(*rows(*'abcdef'), name='a.jsonl')
  b = write(*rows(*'ghijkl'), name='b.jsonl')
  data = prepare(((a, 3), (b, 1)), buffer=12)
  assert data.order.state(99) != data.order.state(0)
  assert any(
    note.startswith(f'{a}: streamed, 75.0%') for note in data.report.notes
  )


def test_too_much_lost_in_the_first_block_is_refused(prepare, write):
  held = write(*rows(*'abc'), name='held.jsonl')
  long = json.dumps({'prompt': 'd', 'completion': 'the answer ' * 30})
  with pytest.raises(
    DataError, match=r'data\.jsonl: 8 of 8 examples lose .*\(8 cut, 0'
  ):
    prepare(write(long), held, max_length=40)


def test_no_row_of_the_hub_is_fetched_before_it_is_read(prepare, monkeypatch):
  streamed = []

  def load(*_, split, streaming):
    streamed.append(streaming)
    return map(json.loads, rows(*'abcdefg'))

  monkeypatch.setattr(datasets, 'load_dataset', load)
  prepare('owner/name')
  assert len(streamed) > 1
  assert all(streamed)


def test_a_column_that_no_row_of_the_first_block_has_is_refused(prepare, write):
  names = {'prompt': 'prompt', 'completion': 'completion', 'system': 'sytem'}
  with pytest.raises(DataError, match=r"has the column 'sytem'"):
    prepare(write(*rows(*'abcdefg')), columns=tuple(names.items()))


def test_what_later_blocks_lose_is_warned_of(prepare, write):
  held = write(*rows(*'abc'), name='held.jsonl')
  long = json.dumps({'prompt': 'd', 'completion': 'the answer ' * 30})
  path = write(*rows(*'efghijkl'), *[long] * 8)
  data = prepare(path, held, max_length=40)
  with pytest.warns(UserWarning, match=r'8 of 8 examples of a block \(100%\)'):
    [data.order.batch(step) for step in range(6)]


def test_empty_rows_of_a_batch_count_as_not_filled(prepare, write):
  data = prepare(write(*rows(*'abcdefg')), batch_size=3, pack=False)
  assert any(n.startswith('2.7 of 3 rows a step') for n in data.report.notes)
  places = sum(e.places for e in data.train)
  assert data.report.packing_efficiency == places / (3 * 3 * 99)
