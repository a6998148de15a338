import pytest

from jlora.data.conversations import Message, detect_format, read_row

HI = {'role': 'user', 'content': 'hi'}
YO = {'role': 'assistant', 'content': 'yo'}
SYSTEM = {'role': 'system', 'content': 'be brief'}
ROWS = {
  'messages': {'messages': [HI, YO]},
  'prompt/completion': {'prompt': 'hi', 'completion': 'yo'},
  'alpaca': {'instruction': 'hi', 'input': '', 'output': 'yo'},
}


@pytest.mark.parametrize('name', ROWS)
def test_every_format_says_the_same(name):
  assert detect_format(ROWS[name]) == name
  assert read_row(ROWS[name], name).messages == (
    Message('user', 'hi', False),
    Message('assistant', 'yo', True),
  )


def test_text_is_learned_as_a_whole():
  row = {'text': 'once upon'}
  conversation = read_row(row, detect_format(row))
  assert conversation.is_text
  assert conversation.messages[0].trained


def test_an_alpaca_input_follows_the_instruction():
  row = {'instruction': 'add', 'input': '1 2', 'output': '3'}
  assert read_row(row, 'alpaca').messages[0].content == 'add\n\n1 2'


def test_columns_that_are_none_do_not_count():
  row = {'messages': None, 'text': 'a'}
  assert detect_format(row) == 'text'


def test_a_turn_of_weight_zero_is_not_trained():
  row = {'messages': [HI, {**YO, 'weight': 0}, HI, YO]}
  trained = [m.trained for m in read_row(row, 'messages').messages]
  assert trained == [False, False, False, True]


def test_an_unknown_format_lists_its_fields():
  with pytest.raises(ValueError, match=r"\['body'\].*instruction, output"):
    detect_format({'body': 'x'})


@pytest.mark.parametrize(
  'turns',
  [[YO, HI], [HI], [HI, HI, YO], [HI, SYSTEM, YO], [SYSTEM], [HI, YO, HI]],
)
def test_turns_out_of_order_are_refused(turns):
  with pytest.raises(ValueError, match='out of order'):
    read_row({'messages': turns}, 'messages')


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'messages': 'hi'}, "'messages' is 'hi'"),
    ({'messages': []}, "'messages' is"),
    ({'messages': [['user', 'hi']]}, 'no role and content'),
    ({'messages': [HI, {**YO, 'content': [{'type': 'text'}]}]}, 'give text'),
    ({'messages': [HI, {**YO, 'content': ' '}]}, "'content' is ' '"),
    ({'messages': [HI, {**YO, 'content': '\ud800'}]}, 'surrogate'),
    ({'messages': [HI, {**YO, 'weight': 0.5}]}, 'weight 0.5'),
    ({'messages': [HI, {**YO, 'weight': 0}]}, 'no turn is trained'),
    ({'text': 'a'}, "has no 'messages'"),
  ],
)
def test_a_malformed_row_is_refused_with_its_value(row, message):
  with pytest.raises(ValueError, match=message):
    read_row(row, 'messages')
