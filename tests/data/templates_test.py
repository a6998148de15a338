"""Masks of the templates that people use, token by token.

The templates are written here in short, by the rules of those that the models
named beside them ship; texts are what these write. What is learned stands in
brackets.
"""

import dataclasses

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from jlora.data.conversations import Conversation, Message
from jlora.data.templates import check_written, make_fields, notes_on
from jlora.data.tokens import prompt_tokens, tokenize
from jlora.errors import ConfigError, DataError

# Qwen/Qwen2.5-7B-Instruct and others, without its default system turn.
CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content
  + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# meta-llama/Meta-Llama-3-8B-Instruct; its content is trimmed.
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}{{ '<|start_header_id|>' + m.role
  + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# meta-llama/Llama-3.1-8B-Instruct, calls of tools.
LLAMA31 = """\
{{- bos_token }}
{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n'
  + (tools[0] | tojson) + '<|eot_id|>' }}{% endif %}
{%- for m in messages %}{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name
  + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + (m.role if m.role != 'tool' else 'ipython')
  + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# mistralai/Mistral-7B-Instruct-v0.3: a system turn stands before the last
# question, and nowhere once that is answered.
MISTRAL = """\
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}
{%- set ns.system = messages[0].content + '\\n\\n' %}
{%- set messages = messages[1:] %}{% endif %}
{{- bos_token }}
{%- for m in messages %}{% if m.role == 'user' %}
{{- '[INST] ' + (ns.system if loop.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- endif %}{% endfor %}"""
# google/gemma-3-1b-it: the system turn is a part of the first question, and
# the assistant is called model.
GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}
{%- set ns.system = messages[0].content + '\\n\\n' %}
{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n'
  + (ns.system if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# microsoft/Phi-3-mini-4k-instruct: the text ends with a token of its own.
PHI3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}
{%- else %}{{ eos_token }}{% endif %}"""
# microsoft/phi-4.
PHI4 = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content
  + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}
{%- endif %}"""
# Qwen/Qwen3-8B: what was thought before the last question is left out, and an
# answer at the end has a block for thoughts even where there are none.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' + (tools[0] | tojson)
  + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- set thought = m.reasoning_content or '' %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>\\n{"name": "'
  + call.function.name + '", "arguments": ' + (call.function.arguments | tojson)
  + '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n'
  + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

ENDS = {  # bos, eos, other special tokens, tokens that are none
  CHATML: (None, '<|im_end|>', ['<|im_start|>'], []),
  LLAMA3: (
    '<|begin_of_text|>',
    '<|eot_id|>',
    ['<|start_header_id|>', '<|end_header_id|>'],
    [],
  ),
  MISTRAL: ('<s>', '</s>', ['[INST]', '[/INST]'], []),
  GEMMA: ('<bos>', '<eos>', ['<start_of_turn>', '<end_of_turn>'], []),
  PHI3: (
    '<s>',
    '<|endoftext|>',
    ['<|end|>', '<|user|>', '<|assistant|>', '<|system|>'],
    [],
  ),
  PHI4: (None, '<|im_end|>', ['<|im_start|>', '<|im_sep|>'], []),
  QWEN3: (
    None,
    '<|im_end|>',
    ['<|im_start|>', '<|endoftext|>'],
    ['<think>', '</think>', '<tool_call>', '</tool_call>'],
  ),
}
ENDS[LLAMA31] = ENDS[LLAMA3]


def make_tokenizer(template):
  """A tokenizer of bytes with the special tokens of a model."""
  bos, eos, special, added = ENDS.get(template, ENDS[CHATML])
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  inner = tokenizers.Tokenizer(
    models.BPE({c: i for i, c in enumerate(alphabet)}, [])
  )
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens([t for t in (bos, eos, *special) if t])
  inner.add_tokens(added)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    chat_template=template,
    eos_token=eos,
    **({'bos_token': bos} if bos else {}),
  )


def marked(example, tokenizer):
  """The text of an example, what is learned in brackets."""
  edges = np.flatnonzero(np.diff(example.loss_mask)) + 1
  text = ''
  for run in np.split(np.arange(len(example)), edges):
    part = tokenizer.decode(example.tokens[run].tolist())
    text += f'⟦{part}⟧' if example.loss_mask[run[0]] else part
  return text


SYSTEM = Message('system', 'Be kind.')
CHAT = (
  Message('user', 'Hi'),
  Message('assistant', 'Yo é', True),
  Message('user', 'Why?'),
  Message('assistant', 'So.', True),
)
MASKS = {
  'chatml': (
    CHATML,
    (SYSTEM, *CHAT),
    [
      '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
      '<|im_start|>assistant\n⟦Yo é<|im_end|>⟧\n'
      '<|im_start|>user\nWhy?<|im_end|>\n'
      '<|im_start|>assistant\n⟦So.<|im_end|>⟧\n'
    ],
  ),
  'llama3': (
    LLAMA3,
    (SYSTEM, *CHAT),
    [
      '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.'
      '<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yo é<|eot_id|>⟧'
      '<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\n⟦So.<|eot_id|>⟧'
    ],
  ),
  'mistral': (
    MISTRAL,
    CHAT,
    ['<s>[INST] Hi[/INST]⟦ Yo é</s>⟧[INST] Why?[/INST]⟦ So.</s>⟧'],
  ),
  'gemma': (
    GEMMA,
    (SYSTEM, *CHAT),
    [
      '<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n'
      '<start_of_turn>model\n⟦Yo é<end_of_turn>⟧\n'
      '<start_of_turn>user\nWhy?<end_of_turn>\n'
      '<start_of_turn>model\n⟦So.<end_of_turn>⟧\n'
    ],
  ),
  'phi3': (
    PHI3,
    (SYSTEM, *CHAT),
    [
      '<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n'
      '<|assistant|>\n⟦Yo é<|end|>⟧\n'
      '<|user|>\nWhy?<|end|>\n<|assistant|>\n⟦So.<|end|>⟧\n<|endoftext|>'
    ],
  ),
  'phi4': (
    PHI4,
    (SYSTEM, *CHAT),
    [
      '<|im_start|>system<|im_sep|>Be kind.<|im_end|>'
      '<|im_start|>user<|im_sep|>Hi<|im_end|>'
      '<|im_start|>assistant<|im_sep|>⟦Yo é<|im_end|>⟧'
      '<|im_start|>user<|im_sep|>Why?<|im_end|>'
      '<|im_start|>assistant<|im_sep|>⟦So.<|im_end|>⟧'
    ],
  ),
  'qwen3': (
    QWEN3,
    CHAT,
    [
      '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
      '⟦<think>\n\n</think>\n\nYo é<|im_end|>⟧\n',
      '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo é<|im_end|>\n'
      '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n'
      '⟦<think>\n\n</think>\n\nSo.<|im_end|>⟧\n',
    ],
  ),
}


@pytest.fixture(scope='module')
def tokenizer_of():
  made = {}

  def get(template):
    if template not in made:
      made[template] = make_tokenizer(template)
    return made[template]

  return get


@pytest.mark.parametrize('name', MASKS)
def test_what_the_assistant_says_is_learned_with_its_end(tokenizer_of, name):
  template, messages, expected = MASKS[name]
  tokenizer = tokenizer_of(template)
  examples = tokenize(Conversation(messages), tokenizer)
  assert [marked(example, tokenizer) for example in examples] == expected


@pytest.mark.parametrize('name', MASKS)
def test_what_is_given_is_the_prompt_of_generation(tokenizer_of, name):
  template, messages, _ = MASKS[name]
  conversation, tokenizer = Conversation(messages), tokenizer_of(template)
  prompt = prompt_tokens(conversation, tokenizer)
  last = tokenize(conversation, tokenizer)[-1]
  given = np.flatnonzero(np.diff(last.loss_mask.astype(int)) == 1)[-1] + 1
  np.testing.assert_array_equal(prompt, last.tokens[:given])


@pytest.mark.parametrize('name', MASKS)
def test_a_single_answer_is_never_divided(tokenizer_of, name):
  template, messages, _ = MASKS[name]
  tokenizer = tokenizer_of(template)
  single = Conversation(messages[:-2])
  assert len(tokenize(single, tokenizer)) == 1


def test_a_system_turn_that_an_answer_removes_is_given(tokenizer_of):
  tokenizer = tokenizer_of(MISTRAL)
  examples = tokenize(Conversation((SYSTEM, *CHAT)), tokenizer)
  assert [marked(example, tokenizer) for example in examples] == [
    '<s>[INST] Be kind.\n\nHi[/INST]⟦ Yo é</s>⟧',
    '<s>[INST] Hi[/INST] Yo é</s>[INST] Be kind.\n\nWhy?[/INST]⟦ So.</s>⟧',
  ]


TOOL = {'type': 'function', 'function': {'name': 'add'}}
CALLS = (
  Message('user', 'Sum?'),
  Message(
    'assistant',
    '',
    True,
    {'tool_calls': [{'function': {'name': 'add', 'arguments': {'a': 1}}}]},
  ),
  Message('tool', '2'),
  Message('assistant', 'Two.', True),
)
SCHEMA = '{"type": "function", "function": {"name": "add"}}'
CALL_MASKS = {
  'llama31': (
    LLAMA31,
    [
      f'<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SCHEMA}'
      '<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSum?<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\n'
      '⟦{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧'
      '<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\n⟦Two.<|eot_id|>⟧'
    ],
  ),
  'qwen3': (
    QWEN3,
    [
      f'<|im_start|>system\n{SCHEMA}<|im_end|>\n<|im_start|>user\nSum?'
      '<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n<tool_call>'
      '\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧\n',
      f'<|im_start|>system\n{SCHEMA}<|im_end|>\n<|im_start|>user\nSum?'
      '<|im_end|>\n<|im_start|>assistant\n<tool_call>\n'
      '{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
      '<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n'
      '<|im_start|>assistant\n⟦<think>\n\n</think>\n\nTwo.<|im_end|>⟧\n',
    ],
  ),
}


@pytest.mark.parametrize('name', CALL_MASKS)
def test_calls_are_learned_and_results_are_given(tokenizer_of, name):
  template, expected = CALL_MASKS[name]
  tokenizer = tokenizer_of(template)
  examples = tokenize(Conversation(CALLS, tools=(TOOL,)), tokenizer)
  assert [marked(example, tokenizer) for example in examples] == expected


THOUGHT = {'reasoning_content': 'Hm.'}
THOUGHTS = tuple(
  dataclasses.replace(m, more=THOUGHT) if m.trained else m for m in CHAT
)


def test_thoughts_are_learned_where_the_template_keeps_them(tokenizer_of):
  tokenizer = tokenizer_of(QWEN3)
  first, second = tokenize(Conversation(THOUGHTS), tokenizer)
  assert marked(first, tokenizer).endswith(
    'assistant\n⟦<think>\nHm.\n</think>\n\nYo é<|im_end|>⟧\n'
  )
  assert marked(second, tokenizer) == (
    '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo é<|im_end|>\n'
    '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n'
    '⟦<think>\nHm.\n</think>\n\nSo.<|im_end|>⟧\n'
  )


def test_a_field_of_the_template_moves_what_is_given(tokenizer_of):
  tokenizer = tokenizer_of(QWEN3)
  fields = {'enable_thinking': False}
  chat = Conversation(CHAT[:2], template=fields)
  (example,) = tokenize(chat, tokenizer)
  assert marked(example, tokenizer) == (
    '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    '<think>\n\n</think>\n\n⟦Yo é<|im_end|>⟧\n'
  )
  assert tokenizer.decode(prompt_tokens(chat, tokenizer)).endswith(
    '</think>\n\n'
  )
  with pytest.raises(DataError, match=r"does not read 'enable_thinking'"):
    tokenize(chat, tokenizer_of(CHATML))


def test_a_template_that_writes_the_date_is_said():
  class Dated:
    chat_template = '{{ date_string or strftime_now("%d %b %Y") }}'

  assert "today's date" in notes_on(Dated(), ())[0]
  assert notes_on(Dated(), ('date_string',)) == []


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ({'tools': []}, "data.template sets 'tools'"),
    ({'a b': 1}, "data.template sets 'a b'"),
    (3, 'data.template is 3'),
    ('abc', "is 'abc'; it takes a dict of fields"),
  ],
)
def test_wrong_fields_of_a_template_are_refused(value, message):
  with pytest.raises(ConfigError, match=message):
    make_fields(value)


def test_thoughts_between_calls_stay_in_one_example(tokenizer_of):
  call = dataclasses.replace(CALLS[1], more={**CALLS[1].more, **THOUGHT})
  tokenizer = tokenizer_of(QWEN3)
  turns = (CALLS[0], call, *CALLS[2:])
  (example,) = tokenize(Conversation(turns), tokenizer)
  assert marked(example, tokenizer).count('⟦<think>') == 2


@pytest.mark.parametrize(
  ('conversation', 'message'),
  [
    (Conversation(CHAT, tools=(TOOL,)), "no place for 'tools'"),
    (Conversation(CALLS), "no place for 'tool_calls'"),
    (
      Conversation(THOUGHTS, where='a.csv:2'),
      r"a.csv:2: .*'reasoning_content'; set data.thinking='drop'",
    ),
  ],
)
def test_what_a_template_would_leave_out_is_refused(
  tokenizer_of, conversation, message
):
  with pytest.raises(DataError, match=message):
    check_written(conversation, tokenizer_of(CHATML))


ALIKE = (  # words that hold the names, comments, and text
  '{# tools tool_calls reasoning_content #} tools {% if xml_tools %}{% endif %}'
  '{% if enable_thinking and thinking %}{{ my_tool_calls }}{% endif %}'
)


@pytest.mark.parametrize(
  'conversation',
  [
    Conversation(CHAT, tools=(TOOL,)),
    Conversation(CALLS),
    Conversation(THOUGHTS),
    Conversation(CHAT, template={'xml': True}),
  ],
)
def test_only_whole_names_of_a_template_count(tokenizer_of, conversation):
  with pytest.raises(DataError, match=r'no place for|does not read'):
    check_written(conversation, tokenizer_of(ALIKE + CHATML))


def test_thoughts_get_the_name_that_the_template_reads(tokenizer_of):
  tokenizer = tokenizer_of(QWEN3.replace('reasoning_content', 'thinking'))
  _, example = tokenize(Conversation(THOUGHTS), tokenizer)
  assert '<think>\nHm.\n</think>' in marked(example, tokenizer)


@pytest.mark.parametrize(
  'fault', ['1 // 0', 'messages[0].content.x.y', "'%(a)s' % {}"]
)
def test_what_a_template_raises_is_one_sentence(tokenizer_of, fault):
  tokenizer = tokenizer_of('{{ ' + fault + ' }}' + CHATML)
  with pytest.raises(DataError, match='the chat template refuses'):
    tokenize(Conversation(CHAT), tokenizer)
