import dataclasses

import numpy as np
import pytest

from jlora.data.conversations import (
  Conversation,
  Message,
  make_exchange,
  make_text,
)
from jlora.data.tokens import Example, prompt_tokens
from jlora.data.tokens import tokenize as examples_of
from jlora.errors import DataError

CHAT = Conversation(
  (
    Message('user', 'hi there'),
    Message('assistant', 'the answer', True),
    Message('user', 'and?'),
    Message('assistant', 'é is the answer', True),
  )
)


def tokenize(*args, **options):
  (example,) = examples_of(*args, **options)
  return example


def learned(example, tokenizer):
  """Returns the texts of the learned runs."""
  edges = np.flatnonzero(np.diff(example.loss_mask)) + 1
  return [
    tokenizer.decode(run.tolist())
    for run, mask in zip(
      np.split(example.tokens, edges),
      np.split(example.loss_mask, edges),
      strict=True,
    )
    if mask[0]
  ]


def turns(conversation):
  return [dataclasses.asdict(m) for m in conversation.messages]


def test_tokens_are_those_of_the_chat_template(tokenizer):
  oracle = tokenizer.apply_chat_template(turns(CHAT))['input_ids']
  np.testing.assert_array_equal(tokenize(CHAT, tokenizer).tokens, oracle)


def test_assistant_turns_are_learned_with_their_end(tokenizer):
  assert learned(tokenize(CHAT, tokenizer), tokenizer) == [
    'the answer<|im_end|>',
    'é is the answer<|im_end|>',
  ]


def test_an_untrained_turn_is_not_learned(tokenizer):
  first, said, *rest = CHAT.messages
  said = dataclasses.replace(said, trained=False)
  example = tokenize(Conversation((first, said, *rest)), tokenizer)
  assert learned(example, tokenizer) == ['é is the answer<|im_end|>']


def test_nothing_is_closed_after_an_untrained_last_turn(tokenizer):
  *rest, last = CHAT.messages
  last = dataclasses.replace(last, trained=False)
  example = tokenize(Conversation((*rest, last)), tokenizer)
  assert learned(example, tokenizer) == ['the answer<|im_end|>']
  assert tokenizer.decode(example.tokens[-1:]) == '\n'


def test_the_prompt_comes_before_the_first_learned_token(tokenizer):
  chat = make_exchange('hi', '42', system='Be short')
  example = tokenize(chat, tokenizer)
  prompt = prompt_tokens(chat, tokenizer)
  assert prompt.dtype == example.tokens.dtype == np.int32
  np.testing.assert_array_equal(prompt, example.tokens[: len(prompt)])
  assert np.argmax(example.loss_mask) == len(prompt)


def test_a_token_across_the_border_is_learned(make_tokenizer):
  # The header ends in a space, which byte-level BPE joins to the next word.
  template = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  tokenizer = make_tokenizer(template)
  example = tokenize(make_exchange('hi', 'the answer'), tokenizer)
  assert learned(example, tokenizer) == [' the answer<|im_end|>']


@pytest.mark.parametrize('adds', [True, False])
def test_there_is_one_beginning_where_the_template_has_one(
  make_tokenizer, adds
):
  template = (
    '{{ bos_token }}{% for m in messages %}'
    "{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
  )
  tokenizer = make_tokenizer(template, add_bos_token=adds)
  example = tokenize(CHAT, tokenizer)
  assert (example.tokens == tokenizer.bos_token_id).sum() == 1
  assert example.tokens[0] == tokenizer.bos_token_id


def test_a_turn_that_the_template_leaves_open_is_ended(make_tokenizer):
  template = (
    "{% for m in messages %}{{ m['role'] + '=' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant=' }}{% endif %}"
  )
  tokenizer = make_tokenizer(template)
  example = tokenize(make_exchange('a', 'the answer'), tokenizer)
  assert learned(example, tokenizer) == ['the answer<|im_end|>']


def test_a_turn_left_open_is_not_ended_where_it_is_not_trained(make_tokenizer):
  template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
  tokenizer = make_tokenizer(template)
  first, said, *rest = CHAT.messages
  last = dataclasses.replace(rest.pop(), trained=False)
  example = tokenize(Conversation((first, said, *rest, last)), tokenizer)
  assert learned(example, tokenizer) == ['the answer']


def test_text_is_learned_but_for_its_first_token(tokenizer):
  example = tokenize(make_text('the answer is the answer'), tokenizer)
  assert (
    tokenizer.decode(example.tokens) == 'the answer is the answer<|im_end|>'
  )
  assert not example.loss_mask[0]
  assert example.loss_mask[1:].all()


def test_nothing_after_the_last_learned_token_takes_a_place():
  mask = np.array([0, 0, 1, 1, 0, 0], bool)
  assert Example(np.arange(6, dtype=np.int32), mask).places == 3
  assert Example(np.arange(6, dtype=np.int32), mask & False).places == 0


def test_a_template_that_rewrites_the_past_divides_conversations(
  make_tokenizer,
):
  template = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}"
    '<|im_end|>{% endfor %}'
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
  )
  tokenizer = make_tokenizer(template)
  first, second = examples_of(CHAT, tokenizer)
  assert tokenizer.decode(first.tokens) == (
    'user:hi there<|im_end|>assistant:the answer<|im_end|>'
  )
  assert learned(first, tokenizer) == ['the answer<|im_end|>']
  assert learned(second, tokenizer) == ['é is the answer<|im_end|>']
  last = tokenize(CHAT, tokenizer, learn='last')
  np.testing.assert_array_equal(last.tokens, second.tokens)


def test_the_last_turn_or_all_can_be_learned(tokenizer):
  last = tokenize(CHAT, tokenizer, learn='last')
  assert learned(last, tokenizer) == ['é is the answer<|im_end|>']
  everything = tokenize(CHAT, tokenizer, learn='all')
  np.testing.assert_array_equal(everything.tokens, last.tokens)
  assert everything.loss_mask.tolist() == [False] + [True] * (
    len(everything) - 1
  )


def test_all_of_a_text_left_open_ends(make_tokenizer):
  template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
  tokenizer = make_tokenizer(template)
  example = tokenize(CHAT, tokenizer, learn='all')
  assert tokenizer.decode(example.tokens[-1:]) == '<|im_end|>'


def test_an_answer_that_does_not_begin_as_it_is_opened_is_refused(
  make_tokenizer,
):
  template = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}"
  )
  chat = dataclasses.replace(make_exchange('hi', 'yo'), where='a.jsonl:3')
  with pytest.raises(
    DataError, match=r"a\.jsonl:3: .*assistant:<think>'.* turn 2 of 2"
  ):
    tokenize(chat, make_tokenizer(template))


def test_a_template_that_refuses_a_role_says_so(make_tokenizer):
  template = "{{ raise_exception('no system role') }}"
  with pytest.raises(DataError, match=r'user, assistant.*no system role'):
    tokenize(make_exchange('a', 'b'), make_tokenizer(template))


def test_turns_without_a_template_are_refused(make_tokenizer):
  with pytest.raises(DataError, match=r"no chat template.*rows of 'text'"):
    tokenize(CHAT, make_tokenizer(None))


def test_text_without_an_end_token_is_refused(make_tokenizer):
  with pytest.raises(DataError, match='no end-of-sequence token'):
    tokenize(make_text('a'), make_tokenizer(eos_token=None))


def test_an_id_without_a_row_is_refused(tokenizer):
  highest = tokenize(CHAT, tokenizer).tokens.max()
  tokenize(CHAT, tokenizer, vocab_size=int(highest) + 1)
  with pytest.raises(DataError, match=f'token id {highest} has no row'):
    tokenize(CHAT, tokenizer, vocab_size=int(highest))


def test_text_has_no_prompt(tokenizer):
  with pytest.raises(DataError, match="'once' has no prompt"):
    prompt_tokens(make_text('once'), tokenizer)


def test_a_turn_of_no_weight_cannot_be_learned_with_all(tokenizer):
  first, said, *rest = CHAT.messages
  said = dataclasses.replace(said, trained=False, muted=True)
  with pytest.raises(DataError, match=r"weight 0, and data\.learn='all'"):
    tokenize(Conversation((first, said, *rest)), tokenizer, learn='all')
