r"""Answers a prompt, word by word.

python -m jlora.generate --run=DIR --prompt=TEXT
python -m jlora.generate --base=B [--adapter=DIR] --prompt=TEXT

With --merge, adapter and 4-bit weights become plain arrays before the first
token: each token is faster, for the memory of dense weights.
"""

import sys
from typing import TYPE_CHECKING

from absl import flags

from jlora import door
from jlora.errors import ConfigError

if TYPE_CHECKING:
  from jlora.inference.tuned import Tuned

_RUN = flags.DEFINE_string('run', None, 'Run folder.')
_BASE = flags.DEFINE_string('base', None, 'Base model, where there is no run.')
_ADAPTER = flags.DEFINE_string('adapter', None, 'Adapter folder on the base.')
_PROMPT = flags.DEFINE_string('prompt', None, 'What to ask.')
_SYSTEM = flags.DEFINE_string('system', None, 'System turn before the prompt.')
_RAW = flags.DEFINE_bool('raw', False, 'Continue the text; no chat template.')
_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'Longest answer.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 is greedy.')
_TOP_K = flags.DEFINE_integer('top_k', None, 'Sample from the k likeliest.')
_TOP_P = flags.DEFINE_float('top_p', None, 'Sample from this share.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the samples.')
_ANY_BASE = flags.DEFINE_bool(
  'allow_other_base', False, 'Accept an adapter that another base was part of.'
)
_MERGE = flags.DEFINE_bool(
  'merge',
  False,
  'Merge adapter and 4-bit weights into plain arrays before the first token,'
  ' instead of decoding them for each: faster tokens, for 4 bytes a weight in'
  ' memory (2 in bfloat16, where sums are rounded to it), and while they are'
  ' formed the 4-bit weights beside them. How much that is goes to stderr.',
)


def main() -> None:
  """Checks the flags, then generates."""
  if not _PROMPT.value:
    raise ConfigError("--prompt is missing; try --prompt='Hello!'")
  from jlora import runs
  from jlora.data.conversations import Conversation, Message
  from jlora.data.tokens import prompt_tokens
  from jlora.inference.sampler import stream, text_pieces
  from jlora.inference.sampling import Sampling

  sampling = Sampling(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    max_new_tokens=_TOKENS.value,
    seed=_SEED.value,
  )
  tuned = runs.open_model(
    _RUN.value,
    _BASE.value,
    _ADAPTER.value,
    allow_other_base=_ANY_BASE.value,
  )
  if _MERGE.value:
    tuned = _merged(tuned)
  tokenizer = tuned.base.tokenizer
  if _RAW.value:
    prompt = tokenizer(_PROMPT.value, return_tensors='np')['input_ids'][0]
  else:
    turns = [Message('user', _PROMPT.value), Message('assistant', '')]
    if _SYSTEM.value is not None:
      turns.insert(0, Message('system', _SYSTEM.value))
    fields = (
      dict(runs.load_spec(_RUN.value).data.template) if _RUN.value else {}
    )
    prompt = prompt_tokens(
      Conversation(tuple(turns), template=fields), tokenizer
    )
  tokens = stream(
    tuned.apply,
    tuned.params,
    tuned.base.config,
    prompt,
    sampling,
    eos_token_ids=tuned.base.eos_token_ids,
    dtype=tuned.dtype,
  )

  def decode(ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)

  for piece in text_pieces(tokens, decode):
    print(piece, end='', flush=True)
  print()


def _merged(tuned: 'Tuned') -> 'Tuned':
  """Returns a model on plain arrays, and says on stderr what they take."""
  import jax.numpy as jnp

  from jlora.inference.plain import count_plain

  dtype = jnp.dtype(tuned.dtype)
  size = count_plain(tuned.params, dtype)
  if size:
    text = f'forms {size / 2**30:.2f} GiB of plain {dtype} arrays'
  else:
    text = f'all weights are plain {dtype} arrays already'
  print(f'--merge: {text}', file=sys.stderr, flush=True)
  return tuned.merged()


if __name__ == '__main__':
  door.enter(main)
