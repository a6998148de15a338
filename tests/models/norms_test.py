import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.norms import make_norm
from tests.decoders import make_config

torch = pytest.importorskip('torch')


def test_a_scale_about_one_keeps_its_bits_in_bfloat16():
  from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

  rng = np.random.default_rng(0)
  scale, x = rng.normal(0, 0.2, 64), rng.normal(0, 3, (2, 5, 64))
  oracle = Gemma3RMSNorm(64, eps=1e-5).to(torch.bfloat16)
  oracle.weight.data = torch.tensor(scale, dtype=torch.bfloat16)
  expected = oracle(torch.tensor(x, dtype=torch.bfloat16))
  norm = make_norm(make_config('gemma3_text'), jnp.bfloat16)
  params = {'scale': jnp.asarray(scale, jnp.bfloat16)}
  found = norm.apply({'params': params}, jnp.asarray(x, jnp.bfloat16))
  np.testing.assert_array_equal(
    np.asarray(found, 'f4'), expected.float().detach().numpy()
  )
