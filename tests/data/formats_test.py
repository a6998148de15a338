import json

import pytest

from jlora.data.conversations import Message
from jlora.data.formats import detect_format, read_row

HI = {'role': 'user', 'content': 'hi'}
YO = {'role': 'assistant', 'content': 'yo'}
SYSTEM = {'role': 'system', 'content': 'be brief'}
ROWS = {
  'sharegpt': {
    'conversations': [
      {'from': 'human', 'value': 'hi'},
      {'from': 'gpt', 'value': 'yo'},
    ]
  },
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


def test_a_prompt_of_turns_is_given_whole():
  row = {'prompt': [SYSTEM, HI, YO, HI], 'completion': [YO]}
  messages = read_row(row, 'prompt/completion').messages
  assert [m.role for m in messages] == [
    *('system', 'user', 'assistant', 'user', 'assistant')
  ]
  assert [m.trained for m in messages] == [False] * 4 + [True]


@pytest.mark.parametrize('name', ROWS)
def test_a_system_column_comes_first(name):
  messages = read_row(ROWS[name] | {'system': 'be brief'}, name).messages
  assert messages[0] == Message('system', 'be brief')
  assert len(messages) == 3


CALL = {'name': 'add', 'arguments': {'a': 1}}
CALLS = {
  'role': 'assistant',
  'content': None,
  'tool_calls': [{'id': 'x', 'function': {**CALL, 'arguments': '{"a": 1}'}}],
}
RESULT = {'role': 'tool', 'content': '2', 'name': 'add'}
TOOL = {'type': 'function', 'function': {'name': 'add'}}


def test_calls_of_tools_and_their_results_are_turns():
  row = {'messages': [HI, CALLS, RESULT, RESULT, YO], 'tools': [TOOL]}
  conversation = read_row(row, 'messages')
  call, result = conversation.messages[1:3]
  assert call == Message(
    'assistant',
    '',
    True,
    {'tool_calls': [{'type': 'function', 'id': 'x', 'function': CALL}]},
  )
  assert result == Message('tool', '2', False, {'name': 'add'})
  assert conversation.tools == (TOOL,)
  assert read_row({**row, 'tools': json.dumps([TOOL])}, 'messages').tools == (
    TOOL,
  )


def test_sharegpt_calls_tools_by_name():
  row = {
    'conversations': [
      {'from': 'human', 'value': 'hi'},
      {'from': 'function_call', 'value': json.dumps(CALL)},
      {'from': 'observation', 'value': '2'},
      {'from': 'gpt', 'value': 'yo'},
    ]
  }
  call, result = read_row(row, 'sharegpt').messages[1:3]
  assert call.more['tool_calls'][0]['function'] == CALL
  assert result == Message('tool', '2')


def test_what_was_thought_is_kept_for_the_template():
  turn = {**YO, 'reasoning_content': 'hm', 'name': None}
  message = read_row({'messages': [HI, turn]}, 'messages').messages[1]
  assert message.fields() == {
    'role': 'assistant',
    'content': 'yo',
    'reasoning_content': 'hm',
  }


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
    ({'messages': [HI, CALLS, YO]}, 'out of order'),
    ({'messages': [HI, RESULT, YO]}, 'out of order'),
    ({'messages': [HI, CALLS, RESULT]}, 'out of order'),
    ({'messages': [HI, {**YO, 'tool_calls': 3}]}, "'tool_calls' is 3"),
    ({'messages': [HI, {**YO, 'tool_calls': [{}]}]}, r'tool call \{\} has no'),
    (
      {'messages': [HI, {**YO, 'tool_calls': [{**CALL, 'arguments': '{'}]}]},
      "arguments of a tool call are '{', not JSON",
    ),
    ({'messages': [HI, YO], 'tools': '{'}, "'tools' is '{', not JSON"),
    ({'messages': [HI, YO], 'tools': [3]}, 'give a list of JSON schemas'),
  ],
)
def test_a_malformed_row_is_refused_with_its_value(row, message):
  with pytest.raises(ValueError, match=message):
    read_row(row, 'messages')


@pytest.mark.parametrize('field', ['messages', 'conversations'])
@pytest.mark.parametrize('turns', [ROWS['sharegpt'], ROWS['messages']])
def test_turns_are_read_by_their_own_fields(field, turns):
  (turns,) = turns.values()
  row = {field: turns}
  conversation = read_row(row, detect_format(row))
  assert [m.content for m in conversation.messages] == ['hi', 'yo']


def test_an_unknown_speaker_is_named():
  row = {'conversations': [{'from': 'narrator', 'value': 'once'}]}
  with pytest.raises(ValueError, match="'from' 'narrator'; known are system"):
    read_row(row, 'sharegpt')


@pytest.mark.parametrize('name', ['reasoning_content', 'reasoning', 'thinking'])
def test_thoughts_have_one_name_once_they_are_read(name):
  row = {'messages': [HI, {**YO, name: 'hm'}]}
  answer = read_row(row, 'messages').messages[-1]
  assert answer.more == {'reasoning_content': 'hm'}


@pytest.mark.parametrize(
  'row',
  [
    {'messages': [HI, YO], 'tools': f'[{"1" * 5000}]'},
    {'conversations': [{'from': 'function_call', 'value': '1' * 5000}]},
  ],
)
def test_numbers_of_thousands_of_digits_are_no_json(row):
  with pytest.raises(ValueError, match='not JSON'):
    read_row(row, detect_format(row))
