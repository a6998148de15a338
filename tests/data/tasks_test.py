import itertools

import pytest
from reasoning_gym import factory

from jlora.data import tasks
from jlora.errors import DataError


def draw(task, n, **kwargs):
  return list(itertools.islice(tasks.draw_task(task, **kwargs), n))


def test_names_are_those_of_the_package():
  assert tasks.task_names() == tuple(sorted(factory.DATASETS))


def test_a_wrong_name_comes_with_a_close_one():
  with pytest.raises(DataError, match="'leg_count'; did you mean 'leg_count"):
    tasks.check_task('leg_count')


@pytest.mark.parametrize('other', [('train', 1), ('eval', 0)])
def test_streams_share_no_entry(other):
  # Two digits of a sum repeat by chance; a shared stream would repeat all.
  split, seed = other
  first = draw('lcm', 300, split='train', seed=0)
  second = draw('lcm', 300, split=split, seed=seed)
  shared = {c.prompt for c in first} & {c.prompt for c in second}
  assert len(shared) < 30


def test_a_stream_is_the_same_every_time():
  assert draw('gcd', 300, split='train', seed=3) == draw(
    'gcd', 300, split='train', seed=3
  )


def test_a_stream_does_not_start_over():
  drawn = draw('lcm', 280, split='train', seed=0)
  assert drawn[256:] != drawn[:24]


def test_evaluation_does_not_depend_on_the_seed():
  assert draw('gcd', 9, split='eval', seed=3) == draw(
    'gcd', 9, split='eval', seed=4
  )


def test_a_question_states_the_form_of_its_answer():
  (conversation,) = draw('gcd', 1, split='train', seed=0)
  system, user, answer = conversation.messages
  assert system.content == tasks.ANSWER_FORMAT
  assert user.content.startswith('Find the Greatest Common Divisor')
  assert [system.trained, user.trained, answer.trained] == [0, 0, 1]


def test_the_verifier_knows_right_from_wrong():
  for conversation in draw('lcm', 20, split='eval', seed=0):
    assert tasks.score_answer(f' {conversation.reference}\n', conversation) == 1
    assert tasks.score_answer('-1', conversation) < 1


@pytest.mark.parametrize(
  ('task', 'message'),
  [('boxnet', 'nothing to learn'), ('composite', 'by its name alone')],
)
def test_a_task_without_answers_is_refused(task, message):
  with pytest.raises(DataError, match=message):
    draw(task, 1, split='train', seed=0)


@pytest.mark.parametrize(
  ('text', 'fits'),
  [
    ('mother', True),
    (' sister-in-law\n', True),
    ('cheese', True),
    ('Mother.', False),
    ('the mother', False),
    ('mother\nson', False),
    ('', False),
  ],
)
def test_form_is_judged_from_the_references(text, fits):
  shape = tasks.shape_of(['son', 'mother-in-law'])
  assert shape.fits(text) == fits


@pytest.mark.parametrize(
  ('text', 'fits'), [('7', True), ('-12', True), ('x', False), ('1 2', False)]
)
def test_a_numeric_task_wants_a_number(text, fits):
  assert tasks.shape_of(['3', '-41']).fits(text) == fits
