import numpy as np
import pytest

from jlora.checkpoints import weights
from jlora.checkpoints.hf import HfModel
from jlora.checkpoints.llama_cpp import GgufModel
from jlora.checkpoints.model_folders import save_folder
from jlora.errors import BaseModelError

SHAPES = {'a': (2, 3), 'b': (3,)}


def test_exactly_the_wanted_tensors_pass():
  weights.check_tensors('file', SHAPES, dict(SHAPES))


@pytest.mark.parametrize(
  ('found', 'message'),
  [
    ({'a': (2, 3)}, "file lacks 'b'"),
    ({**SHAPES, 'c': (1,)}, "file holds 'c'"),
    ({'a': (3, 2), 'b': (3,)}, r'a has shape \(3, 2\).*asks for \(2, 3\)'),
  ],
)
def test_any_other_set_of_tensors_is_refused(found, message):
  with pytest.raises(BaseModelError, match=message):
    weights.check_tensors('file', found, SHAPES)


def test_many_names_are_counted():
  text = weights.listed({f'n{i}' for i in range(9)})
  assert text == "'n0', 'n1', 'n2', 'n3', 'n4' and 4 more"


def test_a_leaf_is_stacked_and_turned_as_the_decoder_wants(tiny_config):
  shapes = weights.stored_shapes(tiny_config)

  class Source:
    config = tiny_config

    def read(self, name, dtype, index):
      layer = next((int(p) for p in name.split('.') if p.isdigit()), 0)
      out = np.empty(shapes[name], dtype)
      out[:] = np.arange(out.shape[-1]) + 1000 * layer
      return out[index]

  params = weights.load_params(Source(), np.float64)
  kernel = params['layers']['attention']['k_proj']['kernel']
  assert kernel.shape == (2, 64, 32)
  # Each stored row counts its inputs; here they run along axis 1.
  np.testing.assert_array_equal(kernel[1, :, 5], 1000 + np.arange(64))
  assert kernel.dtype == np.float64


@pytest.mark.parametrize('kind', ['folder', 'Q8_0', 'bfloat16'])
def test_a_part_of_a_leaf_is_read_alone(
  kind, write_gguf, tmp_path, tiny_config
):
  path = write_gguf(tmp_path / 'x.gguf', 'Q8_0' if kind == 'Q8_0' else 'F32')
  model = GgufModel(path)
  if kind != 'Q8_0':
    dtype = 'float32' if kind == 'folder' else kind
    tokenizer = model.load_tokenizer()
    params = weights.load_params(model)
    save_folder(tmp_path / 'x', tiny_config, params, tokenizer, dtype)
    model = HfModel(tmp_path / 'x')
  cuts = {1: slice(1, 2), 32: slice(3, 17), 64: slice(8, 48), 96: slice(40, 96)}

  def check(path, leaf):
    index = tuple(cuts.get(n, slice(1, n)) for n in leaf.shape)
    whole, part = leaf.read(), leaf.read(index)
    np.testing.assert_array_equal(part, whole[index], err_msg=path)
    np.testing.assert_array_equal(np.asarray(leaf), whole)
    assert leaf.rounded('float16').read(index).dtype == np.float16

  weights.load_params(model, place=check)
