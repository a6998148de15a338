"""What exports refuse before any weights are read."""

import pytest

import jlora
from jlora.checkpoints.bases import open_base
from jlora.errors import ConfigError
from jlora.inference.exports import Files
from jlora.inference.packing import write_packed
from jlora.inference.refusals import check_form, check_outputs
from jlora.models import families


@pytest.mark.parametrize(
  ('to', 'out', 'message'),
  [
    ('merged', 'base', 'base is .*base, which it is made from'),
    ('merged', '.', 'would replace .*which it is made from'),
    ('merged', 'base/merged', 'lies in .*base, which'),
    ('gguf', 'base/m.gguf', 'lies in .*base, which'),
    ('gguf', 'base.gguf', r'base\.gguf is '),
    ('peft', 'run/adapter', 'adapter is '),
    ('merged', 'run', 'would replace .*run/adapter'),
    ('bnb4', 'x', 'x-adapter is '),
    ('merged', 'link', 'link|base is '),
    ('merged', 'other', "holds 'thesis.tex'"),
    ('peft', 'other', "holds 'thesis.tex'"),
    ('bnb4', 'y', 'y-adapter, where the adapter would be written, holds'),
  ],
)
def test_sources_and_other_files_are_not_replaced(tmp_path, to, out, message):
  sources = [tmp_path / x for x in ('base', 'base.gguf', 'x-adapter')]
  sources.append(tmp_path / 'run/adapter')
  for path in (*sources, tmp_path / 'other', tmp_path / 'y-adapter'):
    path.mkdir(parents=True)
  (tmp_path / 'other/thesis.tex').write_text('years of work')
  (tmp_path / 'link').symlink_to(tmp_path / 'base')
  with pytest.raises(ConfigError, match=message):
    check_outputs(to, tmp_path / out, sources, adapted=True)
  check_outputs(to, tmp_path / 'run/new.gguf', sources, adapted=True)


def test_only_a_base_has_no_place_beside(tmp_path):
  (tmp_path / 'y-adapter').mkdir()
  check_outputs('bnb4', tmp_path / 'y', [], adapted=False)


LORA = jlora.LoraSpec(targets='.*/up_proj/kernel')


@pytest.mark.parametrize(
  ('to', 'spec', 'quant', 'message'),
  [
    ('peft', None, None, 'there is no adapter to write'),
    ('bnb4', LORA, None, 'in full precision here'),
    ('bnb4', LORA, jlora.QuantSpec(format='int8'), 'is in int8'),
    ('gguf', LORA, None, "'Q4_K' is not written"),
  ],
)
def test_forms_are_refused_by_sizes_alone(
  square_base, monkeypatch, to, spec, quant, message
):
  base = open_base(str(square_base))
  monkeypatch.delattr('jlora.checkpoints.hf.HfModel.read')
  spec, quant = (x and families.resolve(x, base.config) for x in (spec, quant))
  with pytest.raises(ConfigError, match=message):
    check_form(to, base, spec, quant, kind='Q4_K')


def test_codes_have_no_original_to_merge_into(make_tuned, tmp_path):
  write_packed(make_tuned(), tmp_path / 'b', Files(dtype='float32'))
  with pytest.raises(ConfigError, match='not the weights that were quantized'):
    check_form(
      'merged', open_base(str(tmp_path / 'b')), LORA, None, into='original'
    )
