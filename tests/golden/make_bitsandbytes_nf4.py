"""Writes bitsandbytes_nf4.npz: the bytes that bitsandbytes makes of a kernel.

python tests/golden/make_bitsandbytes_nf4.py

Made with bitsandbytes 0.50.2 and torch 2.13.0 on CPU; the file holds the
versions. The kernel is `RandomState(0).randn(256, 96)` as float32, a stream
that numpy keeps forever; bitsandbytes gets it transposed, as torch stores it.
"""

import pathlib

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional

PATH = pathlib.Path(__file__).with_name('bitsandbytes_nf4.npz')


def main():
  kernel = np.random.RandomState(0).randn(256, 96).astype(np.float32)
  weight = torch.from_numpy(kernel.T.copy())
  settings = {'blocksize': 64, 'quant_type': 'nf4'}
  packed, single = functional.quantize_4bit(weight, **settings)
  again, double = functional.quantize_4bit(
    weight, compress_statistics=True, **settings
  )
  if not torch.equal(packed, again):
    raise RuntimeError('double quantization changed the codes')
  np.savez_compressed(
    PATH,
    versions=[f'bitsandbytes {bitsandbytes.__version__}', torch.__version__],
    packed=packed.numpy(),
    absmax=single.absmax.numpy(),
    nested_absmax=double.absmax.numpy(),
    nested_code=double.state2.code.numpy(),
    nested_absmax2=double.state2.absmax.numpy(),
    offset=double.offset.numpy(),
    decoded=functional.dequantize_4bit(packed, single).numpy(),
    nested_decoded=functional.dequantize_4bit(packed, double).numpy(),
  )


if __name__ == '__main__':
  main()
