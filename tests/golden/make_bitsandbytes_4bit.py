"""Writes bitsandbytes_4bit.npz: the bytes that bitsandbytes makes of a kernel.

python tests/golden/make_bitsandbytes_4bit.py

Made with bitsandbytes 0.50.2 and torch 2.13.0 on CPU; the file holds the
versions. The kernel is `RandomState(0).randn(4096, 6)` as float32, a stream
that numpy keeps forever; bitsandbytes gets it transposed, as torch stores it.
Of decoded kernels it holds the sha256, with every zero positive: bitsandbytes
decodes FP4's second zero to a negative one.
"""

import hashlib
import pathlib

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional

PATH = pathlib.Path(__file__).with_name('bitsandbytes_4bit.npz')
BLOCK_SIZES = (32, 64, 256, 4096)


def digest(kernel: torch.Tensor) -> str:
  return hashlib.sha256((kernel.numpy() + np.float32(0)).tobytes()).hexdigest()


def bytes_of(weight: torch.Tensor, name: str, block_size: int) -> dict:
  settings = {'blocksize': block_size, 'quant_type': name}
  packed, single = functional.quantize_4bit(weight, **settings)
  again, double = functional.quantize_4bit(
    weight, compress_statistics=True, **settings
  )
  if not torch.equal(packed, again):
    raise RuntimeError('double quantization changed the codes')
  return {
    'packed': packed.numpy(),
    'absmax': single.absmax.numpy(),
    'nested_absmax': double.absmax.numpy(),
    'nested_absmax2': double.state2.absmax.numpy(),
    'offset': double.offset.numpy(),
    'decoded': digest(functional.dequantize_4bit(packed, single)),
    'nested_decoded': digest(functional.dequantize_4bit(packed, double)),
  }


def main():
  kernel = np.random.RandomState(0).randn(4096, 6).astype(np.float32)
  weight = torch.from_numpy(kernel.T.copy())
  arrays = {
    f'{name}/{block_size}/{field}': value
    for name in ('nf4', 'fp4')
    for block_size in BLOCK_SIZES
    for field, value in bytes_of(weight, name, block_size).items()
  }
  versions = [f'bitsandbytes {bitsandbytes.__version__}', torch.__version__]
  np.savez_compressed(PATH, versions=versions, **arrays)


if __name__ == '__main__':
  main()
