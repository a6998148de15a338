import json

import pytest

from jlora.data import streams
from jlora.data.recipe import Recipe
from jlora.data.streams import SourceStream
from jlora.errors import DataError


@pytest.fixture
def make_stream(tokenizer):
  def make(source, max_length=99, recipe=None, **options):
    recipe = recipe or Recipe(tokenizer=tokenizer, max_length=max_length)
    return SourceStream(source, recipe, **options)

  return make


@pytest.fixture
def said(tokenizer):
  """Takes examples, and returns what each learns."""

  def take(stream, n):
    examples = [stream.take() for _ in range(n)]
    return [
      tokenizer.decode(e.tokens[e.loss_mask].tolist()).removesuffix(
        '<|im_end|>'
      )
      for e in examples
    ]

  return take


def rows(*answers):
  return [json.dumps({'prompt': f'to {a}', 'completion': a}) for a in answers]


def test_rows_come_in_their_order_round_and_round(make_stream, said, write):
  stream = make_stream(write(*rows(*'abc')))
  assert said(stream, 7) == [*'abcabca']
  assert stream.rounds == 2
  assert stream.position == (1, 0)


def test_skipped_and_held_out_rows_are_never_trained(make_stream, said, write):
  path = write(*rows(*'abcdef'))
  held_out = make_stream(path)._open(0)
  keys = {next(held_out).prompt_key() for _ in range(4)}
  stream = make_stream(path, skip=1, held_out=keys)
  assert said(stream, 4) == [*'efef']
  assert stream.duplicates == 6
  limited = make_stream(path, skip=1, limit=2)
  assert said(limited, 3) == [*'bcb']


@pytest.mark.parametrize('max_length', [4, 99])
def test_a_position_brings_back_what_follows(make_stream, write, max_length):
  texts = [json.dumps({'text': f'{i} is the answer ' * i}) for i in range(1, 6)]
  path = write(*texts)
  straight = make_stream(path, max_length)
  for _ in range(40):
    position = straight.position
    example, other = straight.take(), make_stream(path, max_length)
    other.seek(json.loads(json.dumps(position)))
    assert other.take().tokens.tolist() == example.tokens.tolist()
  assert straight.rounds


def test_rows_before_a_position_are_not_tokenized(tokenizer, write):
  made = []

  class Counted(Recipe):
    def make(self, conversation):
      made.append(conversation.where)
      return super().make(conversation)

  path = write(*rows(*'abcdef'))
  recipe = Counted(tokenizer=tokenizer, max_length=99)
  stream = SourceStream(path, recipe)
  stream.seek((4, 0))
  stream.take()
  assert made == [f'{path}:5']


def test_a_malformed_row_is_named_again_when_it_is_read_again(
  make_stream, write
):
  path = write(*rows('a'), '{"prompt": 3}', *rows('b'))
  stream = make_stream(path)
  stream.take()
  for _ in range(2):
    with pytest.raises(DataError, match=f"{path}:2: has no 'completion'"):
      stream.take()
    stream.seek((1, 0))


def test_a_round_without_an_example_is_refused(make_stream, write):
  with pytest.raises(DataError, match=r'gives no example.*held out: 2'):
    make_stream(write(*rows(*'ab')), skip=2).take()


def test_an_endless_source_without_an_example_is_given_up(
  make_stream, monkeypatch
):
  monkeypatch.setattr(streams, '_BARREN', 20)
  with pytest.raises(DataError, match=r'gives no example.*too long: 21'):
    make_stream('reasoning_gym:gcd', 20).take()


def test_a_position_that_is_gone_is_refused(make_stream, write):
  text = json.dumps({'text': 'the answer is ' * 9})
  stream = make_stream(write(text), max_length=4)
  with pytest.raises(DataError, match='has no row 3 any more'):
    stream.seek((3, 1))
  stream.seek((3, 0))
  with pytest.raises(DataError, match='has no row 3 any more'):
    stream.take()
  stream.seek((1, 0))  # the end of a round
  stream.take()


def test_a_task_is_drawn_without_end(make_stream):
  one, other = (make_stream('reasoning_gym:gcd', 256) for _ in range(2))
  examples = [one.take() for _ in range(4)]
  other.seek((3, 0))
  assert other.take().tokens.tolist() == examples[3].tokens.tolist()


def test_what_was_read_is_said(make_stream, write):
  path = write(*rows('a', 'the answer ' * 30))
  stream = make_stream(path, max_length=30)
  for _ in range(3):
    stream.take()
  assert stream.line().startswith(
    f'{path}: read 5 examples, 2 rounds ended; 0 cut, 2 dropped'
  )
