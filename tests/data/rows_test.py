import pytest

from jlora.data.rows import RowReader, columns_of, make_columns
from jlora.errors import ConfigError, DataError

COLUMNS = (('prompt', 'question'), ('completion', 'answer'))
ROW = {'question': 'q', 'answer': 'a', 'text': 'not this', 'messages': []}


def test_named_columns_are_read_and_no_other():
  reader = RowReader('a.csv', COLUMNS)
  conversation = reader.read('a.csv:2', ROW)
  assert [m.content for m in conversation.messages] == ['q', 'a']
  assert reader.format == 'prompt/completion'
  assert conversation.where == 'a.csv:2'


def test_a_named_column_that_a_row_lacks_lists_the_columns():
  with pytest.raises(
    DataError, match=r"a.csv:2: there is no column 'question'.*'quest'"
  ):
    RowReader('a.csv', COLUMNS).read('a.csv:2', {'quest': 'q', 'answer': 'a'})


def test_a_column_that_some_rows_have_must_be_in_one():
  reader = RowReader('a.jsonl', (*COLUMNS, ('system', 'rules')))
  reader.read('a.jsonl:1', ROW)
  with pytest.raises(
    DataError, match=r"no row that was read has the column 'rules'.*answer"
  ):
    reader.check_seen()
  reader.read('a.jsonl:2', ROW | {'rules': 'Be short.'})
  reader.check_seen()


def test_the_first_row_decides_the_format():
  reader = RowReader('a.jsonl')
  reader.read('a.jsonl:1', {'text': 'a'})
  with pytest.raises(DataError, match=r"a\.jsonl:2: has no 'text'"):
    reader.read('a.jsonl:2', {'prompt': 'a', 'completion': 'b'})


def test_columns_may_differ_by_source():
  columns = make_columns({'a.csv': {'text': 'body'}, 'b.csv': dict(COLUMNS)})
  assert columns_of('a.csv', columns) == (('text', 'body'),)
  assert columns_of('b.csv', columns) == COLUMNS
  assert columns_of('c.csv', columns) == ()
  assert columns_of('c.csv', make_columns(dict(COLUMNS))) == COLUMNS


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ({'question': 'prompt'}, "'prompt' as 'question'.*fields messages"),
    ({'prompt': 3}, 'data.columns is 3; it takes a dict'),
    ({'a.csv': {'text': 3}}, "reads 3 as 'text'"),
    ('prompt', "'prompt'; it takes a dict"),
    ([['prompt']], 'it takes a dict'),
    ({'prompt': 'q', 'a.csv': {'text': 'b'}}, 'not both'),
  ],
)
def test_wrong_columns_are_refused(value, message):
  with pytest.raises(ConfigError, match=message):
    make_columns(value)


def test_columns_that_are_not_read_are_counted():
  reader = RowReader('a.jsonl')
  for row in ({'text': 'a', 'id': 1}, {'text': 'b', 'id': 2, 'url': ''}):
    reader.read('a.jsonl', row)
  assert reader.unread() == '; columns not read: id (2 rows), url (1 rows)'


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'prompt': 'a', 'completion': 'b', 'label': False}, "'label' is False"),
    (
      {'instruction': 'a', 'output': 'b', 'history': [['x', 'y']]},
      "'messages'",
    ),
  ],
)
def test_columns_that_turn_the_meaning_around_are_refused(row, message):
  with pytest.raises(DataError, match=message):
    RowReader('a.jsonl').read('a.jsonl:1', row)
