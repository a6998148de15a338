import json
import math

import matplotlib.image
import numpy as np

from jlora.training.report import draw_losses, samples_markdown, to_json


def test_the_curves_are_drawn_over_what_is_finite(tmp_path):
  lines = [{'step': 0, 'eval_loss': 2.0}, {'step': 1, 'loss': None}]
  draw_losses(lines, tmp_path / 'a.png')
  image = matplotlib.image.imread(tmp_path / 'a.png')
  assert image.shape[:2] == (480, 840)
  draw_losses([*lines, {'step': 2, 'loss': 1.0}], tmp_path / 'b.png')
  other = matplotlib.image.imread(tmp_path / 'b.png')
  assert not np.array_equal(image, other)


def test_a_run_without_lines_has_empty_curves(tmp_path):
  draw_losses([{'step': 1, 'loss': 1.0}], tmp_path / 'a.png')
  assert (tmp_path / 'a.png').stat().st_size


def test_samples_stand_under_their_prompt():
  text = samples_markdown(['a\nb'], ['7'], ['six `x`\n'], ['7'])
  assert text == (
    '# Samples\n\n## 1\n\n> a\n> b\n\n- reference: `7`\n'
    "- before: `six 'x'`\n- after: `7`\n"
  )


def test_samples_have_no_after_while_training():
  assert '- after' not in samples_markdown(['a'], [None], ['b'], None)
  assert '- reference' not in samples_markdown(['a'], [None], ['b'], None)


def test_a_summary_is_json_with_sorted_keys():
  text = to_json({'b': math.inf, 'a': {'d': math.nan, 'c': (1, 2.5)}})
  assert json.loads(text) == {'a': {'c': [1, 2.5], 'd': None}, 'b': None}
  assert text.index('"a"') < text.index('"b"')
