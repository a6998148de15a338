"""How byte-level tokenizers cut text into words before merges apply.

llama.cpp names the ways in `tokenizer.ggml.pre`. Each is that of the
tokenizer.json that the name was made from, as are the expressions; those of
llama.cpp, in `llm_tokenizer_bpe` of `src/llama-vocab.cpp`, are written out for
an engine of its own, and it leaves normalization out.
"""

import dataclasses

import tokenizers
from tokenizers import normalizers, pre_tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
  """One way to cut text.

  Attributes:
    pattern: What matches is a word, and so is what lies between matches. None
      is GPT-2's pattern, which the `tokenizers` package knows.
    digits: Whether each digit is a word, before the pattern is applied.
    nfc: Whether text is brought to Unicode's composed form first.
    ignore_merges: Whether a word that is a token is not merged from pieces.
    adds_bos: What llama.cpp does where the file does not say.
  """

  pattern: str | None = None
  digits: bool = False
  nfc: bool = False
  ignore_merges: bool = False
  adds_bos: bool = False

  @property
  def normalizer(self) -> normalizers.Normalizer | None:
    """What text goes through first."""
    return normalizers.NFC() if self.nfc else None

  @property
  def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
    """What makes words, spelled in GPT-2's alphabet of bytes."""
    if self.pattern is None:
      steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
      pattern = tokenizers.Regex(self.pattern)
      steps = [
        pre_tokenizers.Split(pattern, behavior='isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    if self.digits:
      # First, so that a run of spaces before a number stays whole.
      steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_PUNCTUATION = r'| ?[^\s\p{L}\p{N}]+[\r\n]*'
_SPACES = r'|\s*[\r\n]+|\s+(?!\S)|\s+'
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r'|[^\r\n\p{L}\p{N}]?\p{L}+'
_UPPER, _LOWER = r'\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}', r'\p{Ll}\p{Lm}\p{Lo}\p{M}'
# Words that start anew where a small letter is followed by a capital one.
_CASED = (
  rf'[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+',
  rf'[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*',
)
_SLASHED = r'| ?[^\s\p{L}\p{N}]+[\r\n/]*'
_LLAMA3 = _ENDINGS + _WORD + r'|\p{N}{1,3}' + _PUNCTUATION + _SPACES

CUTS = {
  'gpt-2': Cut(),
  # HuggingFaceTB/SmolLM-135M and SmolLM2.
  'smollm': Cut(digits=True),
  # meta-llama/Meta-Llama-3-8B and HuggingFaceTB/SmolLM3-3B.
  'llama-bpe': Cut(pattern=_LLAMA3, ignore_merges=True, adds_bos=True),
  # databricks/dbrx-base and microsoft/phi-4, which is cl100k of tiktoken.
  'dbrx': Cut(pattern=_LLAMA3),
  # Qwen/Qwen1.5-7B, and up to Qwen3.
  'qwen2': Cut(
    pattern=_ENDINGS + _WORD + r'|\p{N}' + _PUNCTUATION + _SPACES, nfc=True
  ),
  # mistralai/Mistral-Nemo-Base-2407.
  'tekken': Cut(
    pattern='|'.join(_CASED) + r'|\p{N}' + _SLASHED + _SPACES,
    ignore_merges=True,
    adds_bos=True,
  ),
  # Xenova/gpt-4o and microsoft/Phi-4-mini-instruct, o200k of tiktoken.
  'gpt-4o': Cut(
    pattern='|'.join(f'{word}{_ENDINGS}?' for word in _CASED)
    + r'|\p{N}{1,3}'
    + _SLASHED
    + _SPACES
  ),
}

# Other names of the same, in llama.cpp.
_ALIASES = {
  'deepseek-r1-qwen': 'qwen2',
  'falcon3': 'llama-bpe',
  'llama-v3': 'llama-bpe',
  'llama3': 'llama-bpe',
  'llama4': 'gpt-4o',
  'pixtral': 'llama-bpe',
  'smaug-bpe': 'dbrx',
}
CUTS |= {alias: CUTS[name] for alias, name in _ALIASES.items()}
