import dataclasses
import json

import pytest

from jlora.data.prepare import prepare as prepare_by
from jlora.data.recipe import Recipe
from jlora.data.tokens import prompt_tokens
from jlora.errors import DataError


def prepare(train, held_out, tokenizer, **options):
  """Prepares with those options that are a recipe's, and the others."""
  names = {field.name for field in dataclasses.fields(Recipe)}
  recipe = {k: v for k, v in options.items() if k in names}
  others = {k: v for k, v in options.items() if k not in names}
  recipe = Recipe(tokenizer=tokenizer, **recipe)
  return prepare_by(train, held_out, recipe, **others)


def rows(*questions):
  return [
    json.dumps({'prompt': q, 'completion': 'the answer'}) for q in questions
  ]


def prompts(conversations):
  return [c.messages[-2].content for c in conversations]


def test_a_task_is_ready_to_train_and_to_score(tokenizer):
  data = prepare(
    'reasoning_gym:family_relationships',
    None,
    tokenizer,
    max_length=512,
    train_examples=30,
    eval_examples=20,
  )
  assert len(data.train) == data.report.examples == 30
  assert len(data.eval) == len(data.eval_conversations) == 20
  for conversation in data.eval_conversations:
    assert data.score(conversation.reference, conversation) == 1
    assert data.is_well_formed(conversation.reference, conversation)
    assert not data.is_well_formed('It is the son.', conversation)


def test_questions_that_training_has_are_replaced_and_counted(tokenizer):
  # Half of a few hundred coin_flip questions repeat another.
  data = prepare(
    'reasoning_gym:coin_flip',
    None,
    tokenizer,
    max_length=256,
    train_examples=30,
    eval_examples=40,
  )
  assert data.report.duplicates > 0
  assert f'{data.report.duplicates} more dropped' in '\n'.join(
    data.report.lines()
  )
  assert len(data.eval_conversations) == 40


def test_a_part_of_a_file_is_held_out_and_it_is_said(tokenizer, write):
  path = write(*rows(*(f'q{i}' for i in range(30))))
  a, b, c = (
    prepare(path, None, tokenizer, max_length=99, seed=seed)
    for seed in (0, 0, 1)
  )
  held = prompts(a.eval_conversations)
  assert len(held) == 3
  assert len(a.train) == 27
  assert held == prompts(b.eval_conversations)
  assert held != prompts(c.eval_conversations)
  assert '3 of 30 held out, chosen by seed 0' in a.report.notes
  assert a.score is None
  assert a.is_well_formed is None


def test_held_out_prompts_that_training_has_are_dropped(tokenizer, write):
  train = write(*rows('a', 'b'), name='train.jsonl')
  held = write(*rows('b ', 'c'), name='eval.jsonl')
  data = prepare(train, held, tokenizer, max_length=99)
  assert prompts(data.eval_conversations) == ['c']
  assert data.report.duplicates == 1
  with pytest.raises(DataError, match='all 2 held-out examples'):
    prepare(train, train, tokenizer, max_length=99)


def test_examples_are_limited(tokenizer, write):
  train = write(*rows(*'abcd'), name='train.jsonl')
  held = write(*rows(*'efgh'), name='eval.jsonl')
  data = prepare(
    train, held, tokenizer, max_length=99, train_examples=3, eval_examples=2
  )
  assert (len(data.train), len(data.eval)) == (3, 2)


def test_examples_that_short_sources_do_not_have_are_said(tokenizer, write):
  held = write(*rows(*'xyz'), name='held.jsonl')
  a = write(*rows(*'abcdefgh'), name='a.jsonl')
  b = write(*rows('i'), name='b.jsonl')
  sources = ((a, None), (b, None))
  data = prepare(
    sources, held, tokenizer, max_length=99, train_examples=8, eval_examples=2
  )
  assert len(data.train) == 5
  assert '5 examples to train on, not data.train_examples=8' in '\n'.join(
    data.report.notes
  )


def test_the_report_counts_what_is_trained(tokenizer, write):
  data = prepare(write(*rows('a', 'b', 'c')), None, tokenizer, max_length=99)
  report = data.report
  assert report.tokens == sum(len(e) for e in data.train)
  assert report.trained_tokens == sum(e.loss_mask.sum() for e in data.train)
  assert (report.cut, report.dropped, report.split) == (0, 0, 0)


def test_long_text_is_split_and_counted(tokenizer, write):
  texts = [json.dumps({'text': 'the answer ' * n}) for n in (2, 30, 40)]
  data = prepare(write(*texts), None, tokenizer, max_length=16)
  assert data.report.examples > 2
  assert data.report.split >= 2


def test_the_end_of_a_single_text_is_held_out(tokenizer, write):
  path = write(*(f'{i} the answer' for i in range(100)), name='book.txt')
  data = prepare(path, None, tokenizer, max_length=16)
  (held,) = data.eval_conversations
  assert held.reference.startswith('90 the answer\n')
  assert len(data.train) > 20
  assert 'the last 140 of 1,390 characters held out' in data.report.notes


def test_a_folder_holds_its_valid_files_out(tokenizer, write, tmp_path):
  write(*rows(*'abc'), name='train.jsonl')
  write(*rows(*'de'), name='valid.jsonl')
  data = prepare(str(tmp_path), None, tokenizer, max_length=99)
  assert prompts(data.eval_conversations) == ['d', 'e']
  assert len(data.train) == 3


def test_columns_are_read_under_their_names(tokenizer, write):
  path = write('q,a', 'x,y', 'z,y', name='a.csv')
  columns = (('prompt', 'q'), ('completion', 'a'))
  data = prepare(path, None, tokenizer, max_length=99, columns=columns)
  assert len(data.train) == len(data.eval) == 1


def test_sources_are_mixed_by_weight_and_it_is_said(tokenizer, write):
  a = write(*rows(*(f'a{i}' for i in range(30))), name='a.jsonl')
  b = write(*rows(*(f'b{i}' for i in range(20))), name='b.jsonl')
  data = prepare(((a, 3), (b, 1)), None, tokenizer, max_length=99)
  assert (len(data.train), len(data.eval)) == (45, 5)
  assert data.order.counts == (27, 9)
  assert f'{a}: 27 of 27 examples an epoch, 75.0% of it' in data.report.notes
  assert f'{b}: 9 of 18 examples an epoch, 25.0% of it' in data.report.notes
  all_of = prepare(((a, None), (b, None)), None, tokenizer, max_length=99)
  assert all_of.order.counts == (27, 18)


def test_tasks_and_files_mix(tokenizer, write):
  path = write(*rows(*(f'q{i}' for i in range(30))))
  sources = (('reasoning_gym:gcd', 1), (path, 1))
  data = prepare(
    sources, None, tokenizer, max_length=256, train_examples=20, eval_examples=8
  )
  assert data.order.counts == (10, 10)
  assert [c.task for c in data.eval_conversations] == ['gcd'] * 4 + [None] * 3
  assert data.score is None


CHAT = {
  'messages': [
    {'role': 'user', 'content': 'q'},
    {'role': 'assistant', 'content': '<think>so</think>the answer'},
    {'role': 'user', 'content': 'again'},
    {'role': 'assistant', 'content': 'the answer is the answer'},
  ]
}


def chats(write, n=3):
  lines = []
  for i in range(n):
    first, *rest = CHAT['messages']
    first = {**first, 'content': f'q{i}'}
    lines.append(json.dumps({'messages': [first, *rest]}))
  return write(*lines)


def test_what_is_learned_can_be_chosen(tokenizer, write):
  path = chats(write)
  counts = {
    learn: prepare(path, None, tokenizer, max_length=99, learn=learn).report
    for learn in ('completions', 'last', 'all')
  }
  share = {learn: r.share_trained for learn, r in counts.items()}
  assert share['last'] < share['completions'] < share['all'] < 1
  assert len({r.tokens for r in counts.values()}) == 1


def test_what_is_thought_is_dropped_and_counted(tokenizer, write):
  path = chats(write)
  kept = prepare(path, None, tokenizer, max_length=99)
  data = prepare(path, None, tokenizer, max_length=99, thinking='drop')
  assert data.report.tokens < kept.report.tokens
  assert 'what is thought is dropped from 3 turns' in data.report.lines()


def test_conversations_that_a_template_divides_are_counted(
  make_tokenizer, write
):
  template = (
    "{% for m in messages %}{{ m['role'] + ':' }}"
    "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}"
    '<|im_end|>{% endfor %}'
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
  )
  data = prepare(chats(write), None, make_tokenizer(template), max_length=99)
  assert (len(data.train), len(data.eval), data.report.divided) == (4, 2, 3)
  assert data.report.eval_examples == 1
  assert '3 conversations divided' in '\n'.join(data.report.lines())


def test_held_out_prompts_get_the_fields_of_the_template(make_tokenizer, write):
  template = (
    "{% for m in messages %}{{ m['role'] + mark + m['content'] }}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' + mark }}{% endif %}"
  )
  tokenizer = make_tokenizer(template)
  data = prepare(
    chats(write), None, tokenizer, max_length=99, template=(('mark', '='),)
  )
  (held,) = data.eval_conversations
  assert tokenizer.decode(prompt_tokens(held, tokenizer)).endswith('assistant=')


def test_a_conversation_that_is_too_long_is_named(tokenizer, write):
  path = chats(write)
  with pytest.raises(DataError, match=rf'{path}:\d: it takes .*too_long'):
    prepare(path, None, tokenizer, max_length=60, too_long='error')


def test_one_row_cannot_be_held_out(tokenizer, write):
  with pytest.raises(DataError, match=r'1 row.*name data\.eval'):
    prepare(write(*rows('a')), None, tokenizer, max_length=99)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer, write):
  path = write(*rows('a', 'b'))
  with pytest.raises(DataError, match='no row in the embedding of 50'):
    prepare(path, None, tokenizer, max_length=99, vocab_size=50)
