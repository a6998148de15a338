"""Folders of every family, as transformers writes them."""

import numpy as np

from jlora.checkpoints.hf import HfModel
from jlora.checkpoints.weights import load_params
from tests.decoders import make_oracle, make_params, stored


def test_a_folder_of_transformers_is_read(family_config, tmp_path):
  params = make_params(family_config)
  make_oracle(family_config, params).save_pretrained(tmp_path)
  model = HfModel(tmp_path)
  assert model.config == family_config
  found = stored(model.config, load_params(model))
  for name, tensor in stored(family_config, params).items():
    np.testing.assert_array_equal(found[name], tensor)
