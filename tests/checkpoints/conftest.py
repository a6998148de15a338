"""A tiny Llama in the forms that bases come in, and one with an adapter."""

import dataclasses
import json
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jlora.checkpoints.peft import load_adapter, save_adapter
from jlora.core import lora, targets, tree
from jlora.core.lora import LoraSpec
from jlora.models import families, layout
from jlora.models.config import DecoderConfig

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  '<|im_end|>\n{% endfor %}'
)


@pytest.fixture(scope='session')
def tiny_config():
  return DecoderConfig(
    vocab_size=300,
    embed_dim=64,
    mlp_dim=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    max_positions=128,
    norm_eps=1e-5,
  )


@pytest.fixture(scope='session')
def vocabulary():
  """Tokens and merges of a byte-level BPE that splits digits."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  text = ['the cat and the hat', 'a  b  c\n\n 1 2  3', 'hello hello there']
  tokenizer.train_from_iterator(text * 20, trainer)
  model = json.loads(tokenizer.to_str())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  tokens += [f'<unused{i}>' for i in range(300 - len(tokens))]
  return tokens, [' '.join(pair) for pair in model['merges']]


@pytest.fixture(scope='session')
def tiny_weights(tiny_config):
  """Tensors as llama.cpp names them, before it permutes queries and keys."""
  c, rng = tiny_config, np.random.default_rng(0)
  wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
  shapes = {
    'attn_norm': (c.embed_dim,),
    'attn_q': (wide, c.embed_dim),
    'attn_k': (narrow, c.embed_dim),
    'attn_v': (narrow, c.embed_dim),
    'attn_output': (c.embed_dim, wide),
    'ffn_norm': (c.embed_dim,),
    'ffn_gate': (c.mlp_dim, c.embed_dim),
    'ffn_up': (c.mlp_dim, c.embed_dim),
    'ffn_down': (c.embed_dim, c.mlp_dim),
  }
  tensors = {
    'token_embd.weight': (c.vocab_size, c.embed_dim),
    'output_norm.weight': (c.embed_dim,),
  }
  for i in range(c.layers):
    tensors |= {f'blk.{i}.{k}.weight': shape for k, shape in shapes.items()}
  return {
    name: rng.normal(1.0 if 'norm' in name else 0.0, 0.1, shape).astype('f4')
    for name, shape in tensors.items()
  }


@pytest.fixture(scope='session')
def write_gguf(tiny_config, tiny_weights, vocabulary):
  """Returns a function that writes the tiny model as a GGUF file."""
  c = tiny_config

  def write(path, kind='F32', *, keys=None, tensors=None, kv=None):
    writer = gguf.GGUFWriter(path, 'llama')
    fields = {
      'block_count': c.layers,
      'context_length': c.max_positions,
      'embedding_length': c.embed_dim,
      'feed_forward_length': c.mlp_dim,
      'attention.head_count': c.heads,
      'attention.head_count_kv': c.kv_heads,
      'rope.dimension_count': c.head_dim,
      **(keys or {}),
    }
    for key, value in fields.items():
      writer.add_uint32(f'llama.{key}', value)
    writer.add_float32('llama.attention.layer_norm_rms_epsilon', c.norm_eps)
    writer.add_float32('llama.rope.freq_base', c.rope_theta)
    _add_tokenizer(writer, vocabulary, kv or {})
    for name, tensor in {**tiny_weights, **(tensors or {})}.items():
      if tensor is not None:
        _add_tensor(writer, c, name, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

  return write


def _add_tokenizer(writer, vocabulary, kv):
  tokens, merges = vocabulary
  writer.add_tokenizer_model(kv.get('model', 'gpt2'))
  writer.add_tokenizer_pre(kv.get('pre', 'smollm'))
  writer.add_token_list(kv.get('tokens', tokens))
  writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
  writer.add_token_merges(kv.get('merges', merges))
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(kv.get('eos', 2))
  writer.add_unk_token_id(0)
  writer.add_pad_token_id(2)
  writer.add_add_bos_token(kv.get('add_bos', False))
  writer.add_chat_template(TEMPLATE)


def _add_tensor(writer, config, name, tensor, kind):
  for part, heads in (('attn_q', config.heads), ('attn_k', config.kv_heads)):
    if f'.{part}.' in name:  # as llama.cpp's converter permutes
      split = tensor.reshape(heads, 2, -1, tensor.shape[1])
      tensor = split.swapaxes(1, 2).reshape(tensor.shape)
  kind = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else 'F32']
  data = gguf.quants.quantize(tensor, kind)
  writer.add_tensor(name, data, raw_dtype=kind)


@pytest.fixture(scope='session')
def pieces_of_text():
  """Metadata of a small SentencePiece model, as llama.cpp stores it."""
  special = ['<unk>', '<s>', '</s>', '<|user|>']
  found = [f'<0x{i:02X}>' for i in range(256)]
  words = ['▁the', '▁th', 'he', '▁t', 'er', '▁a', '▁▁', '▁▁▁', 'ou', '▁you']
  words += ['hello', 'hell', 'lo', 'll', 'el', '▁world', '▁w', 'or', 'ld']
  words += ['中文', '\n\n', *sorted(set('▁etaohilrsduwnmfy.,12中文é'))]
  tokens = special + found + words
  types = [2, 3, 3, 4, *[6] * 256, *[1] * len(words)]
  scores = [0.0] * 260 + [-float(i) for i in range(len(words))]
  key = 'tokenizer.ggml'
  return {
    f'{key}.model': 'llama',
    f'{key}.tokens': tokens,
    f'{key}.scores': np.asarray(scores, np.float32),
    f'{key}.token_type': np.asarray(types, np.int32),
    f'{key}.bos_token_id': 1,
    f'{key}.eos_token_id': 2,
    f'{key}.unknown_token_id': 0,
  }


@pytest.fixture(scope='session')
def tiny_gguf(write_gguf, tmp_path_factory):
  return write_gguf(tmp_path_factory.mktemp('gguf') / 'tiny.gguf')


@pytest.fixture(scope='session')
def real_gguf():
  """The default base, from the cache or fetched."""
  from jlora.checkpoints import bases

  return bases.open_base(bases.DEFAULT_BASE).model.paths[0]


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A decoder with random weights and an adapter that is away from zero."""

  config: DecoderConfig
  spec: LoraSpec
  params: dict[str, Any]
  trainable: dict[str, Any]

  def save(self, folder, *, initial=None, **metadata):
    save_adapter(
      folder,
      self.trainable,
      self.spec,
      self.config,
      base_name='tiny',
      metadata=metadata,
      initial=initial,
    )

  def expect_same_bytes_again(self, folder):
    """Loads what was saved, saves that, and compares the files."""
    adapter = load_adapter(folder, self.config)
    again = dataclasses.replace(
      self, spec=adapter.spec, trainable=adapter.trainable
    )
    copy = folder.with_name('again')
    again.save(copy, **adapter.metadata)
    for path in folder.iterdir():
      assert (copy / path.name).read_bytes() == path.read_bytes()


def _make_adapted(tied=True, *, seed=0, config=None, **fields):
  config = config or DecoderConfig(
    vocab_size=48,
    embed_dim=16,
    mlp_dim=24,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=4,
    tie_embeddings=tied,
  )
  patterns = (r'layers/attention/[qv]_proj/kernel', r'layers/mlp/.*/kernel')
  fields = {'rank': 4, 'alpha': 10.0, 'targets': patterns, **fields}
  spec = families.resolve(LoraSpec(**fields), config)
  rng = np.random.default_rng(0)
  leaves = {
    weight.path: rng.normal(0, 0.3, weight.shape).astype('f4')
    for weight in layout.weights(config)
  }
  nodes = random_nodes(leaves, spec, np.random.default_rng(seed))
  return Adapted(config, spec, tree.nest(leaves), tree.nest(nodes))


def random_nodes(leaves, spec, rng):
  """Returns trained leaves by path, away from where they would start."""
  adapted = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  nodes = {
    path: _random_pair(adapted[path], strength.ranks, spec.variant, rng)
    for path, strength in lora.strengths(adapted, spec).items()
  }
  for path in tree.matching(spec.train_full, leaves):
    nodes[path] = {'full': leaves[path] + np.float32(0.5)}
  for pattern, ids in spec.train_rows:
    for path in tree.matching([pattern], leaves):
      rows = leaves[path] if 'embed' in path else leaves[path].T
      nodes[path] = {'rows': rows[list(ids)] + np.float32(0.5)}
  return nodes


def _random_pair(target, ranks, variant, rng):
  stacked, size, out = target.matrix
  kept = np.arange(ranks.max()) < ranks[..., None]
  a = rng.normal(0, 0.2, (*stacked, size, ranks.max()))
  b = rng.normal(0, 0.2, (*stacked, ranks.max(), out))
  node = {'a': a * kept[..., None, :], 'b': b * kept[..., None]}
  if variant == 'dora':
    chosen = (ranks > 0)[..., None]
    node['magnitude'] = rng.uniform(0.5, 2, (*stacked, out)) * chosen
  return {name: array.astype('f4') for name, array in node.items()}


@pytest.fixture(scope='session')
def make_adapted():
  """Returns a function of `tied`, the adapter's seed and LoraSpec's fields."""
  return _make_adapted


@pytest.fixture(scope='session')
def adapted():
  return _make_adapted(train_full=('final_norm/scale',), dropout=0.05)


@pytest.fixture
def adapter_folder(adapted, tmp_path):
  """Returns the folder that `adapted` was saved to."""
  adapted.save(tmp_path / 'adapter', base_sha256='ab', step=7)
  return tmp_path / 'adapter'


@pytest.fixture
def foreign_folder(adapter_folder):
  """Returns the same without what PEFT does not write."""
  (adapter_folder / 'jlora_metadata.json').unlink()
  return adapter_folder
