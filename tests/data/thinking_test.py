import pytest

from jlora.data.conversations import Conversation, Message, make_exchange
from jlora.data.thinking import without_thinking
from jlora.errors import DataError


@pytest.mark.parametrize(
  'answer', ['<think>\nHm.\n</think>\n\nYo.', '\n<think></think>Yo.']
)
def test_a_block_before_the_answer_is_dropped(answer):
  left, dropped = without_thinking(make_exchange('<think>?', answer))
  assert left == make_exchange('<think>?', 'Yo.')
  assert dropped == 1


def test_thoughts_beside_the_answer_are_dropped():
  more = {'reasoning_content': 'Hm.', 'name': 'a'}
  turns = (Message('user', 'Hi'), Message('assistant', 'Yo.', True, more))
  left, dropped = without_thinking(Conversation(turns))
  assert left.messages[1] == Message('assistant', 'Yo.', True, {'name': 'a'})
  assert dropped == 1


def test_what_is_said_later_stays():
  chat = make_exchange('Hi', 'Write <think>x</think>.')
  assert without_thinking(chat) == (chat, 0)


def test_an_answer_of_thoughts_alone_is_refused():
  turns = make_exchange('Hi', '<think>Hm.</think>').messages
  with pytest.raises(DataError, match=r'a\.csv:2: .* nothing but what is'):
    without_thinking(Conversation(turns, where='a.csv:2'))
