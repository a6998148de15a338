import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jlora.core import lora, targets, tree
from jlora.core.arithmetic import add_adapters
from jlora.core.lora import LoraSpec
from jlora.errors import AdapterError, ConfigError

EPS = float(np.finfo(np.float32).eps)
SHAPES = {
  'embed/embedding': (20, 12),
  'layers/up/kernel': (3, 12, 16),
  'layers/out/kernel': (3, 2, 8, 12),
  'norm/scale': (12,),
}
AXES = (
  ('layers/up/kernel', 'layers | in -> out'),
  ('layers/out/kernel', 'layers | heads head_dim -> embed'),
)
PARAMS = tree.nest(
  {p: jax.ShapeDtypeStruct(s, jnp.bfloat16) for p, s in SHAPES.items()}
)
UP, OUT = 'layers/up/kernel', 'layers/out/kernel'


def plan(spec):
  leaves = tree.leaves_by_path(PARAMS)
  adapted = targets.select(leaves, spec.targets, spec.exclude, spec.axes)
  return adapted, lora.strengths(adapted, spec)


def make_adapter(seed=0, **fields):
  """A trained adapter: random factors, zero beyond each layer's rank."""
  spec = LoraSpec(**({'rank': 2, 'alpha': 6.0, 'axes': AXES} | fields))
  adapted, strengths = plan(spec)
  random = np.random.default_rng(seed)
  factors = {}
  for path, strength in strengths.items():
    stacked, size, out = adapted[path].matrix
    used = np.arange(strength.rank) < strength.ranks[..., None]
    a, b = (
      random.normal(size=(*stacked, n, strength.rank)) for n in (size, out)
    )
    a, b = a * used[..., None, :], (b * used[..., None, :]).swapaxes(-1, -2)
    factors[path] = {'a': jnp.asarray(a, 'f4'), 'b': jnp.asarray(b, 'f4')}
  return tree.nest(factors), spec


def updates_of(adapter):
  """Scale times a times b, in float64, keyed by path."""
  trainable, spec = adapter
  factors = tree.leaves_by_path(trainable)
  found = {}
  for path, strength in plan(spec)[1].items():
    a, b = (np.asarray(factors.pop(f'{path}/{k}'), 'f8') for k in 'ab')
    found[path] = strength.scales[..., None, None] * (a @ b)
  assert not factors
  return found


def weighted_sum(adapters, weights):
  total = {}
  for adapter, weight in zip(adapters, weights, strict=True):
    for path, update in updates_of(adapter).items():
      total[path] = total.get(path, 0) + weight * update
  return total


def check_sum(result, expected, rtol=4 * EPS):
  """Compares updates; b is rounded with its weight, and with its scale."""
  found = updates_of(result)
  assert found.keys() == expected.keys()
  for path, update in expected.items():
    atol = rtol * np.abs(update).max()
    np.testing.assert_allclose(found[path], update, rtol=0, atol=atol)


MIXED = (
  {'rank': 2, 'alpha': 6.0},
  {'rank': 3, 'scaling': 'rslora', 'targets': (UP, 'embed/embedding')},
  {'rank': 4, 'rank_pattern': {'layers/1/.*': 1}, 'exclude': ('layers/2/.*',)},
)


def make_mixed():
  return [make_adapter(i, **fields) for i, fields in enumerate(MIXED)]


def test_without_a_rank_the_sum_is_exact():
  adapters, weights = make_mixed(), (1.0, -0.5, 0.25)
  trainable, spec = result = add_adapters(PARAMS, adapters, weights)
  check_sum(result, weighted_sum(adapters, weights))
  paths = (OUT, UP, 'embed/embedding')
  assert spec == LoraSpec(rank=9, alpha=9.0, targets=paths, axes=AXES)
  assert trainable['layers']['up']['kernel']['a'].shape == (3, 12, 9)
  assert trainable['embed']['embedding']['b'].shape == (9, 12)


def test_one_adapter_is_scaled():
  adapter = make_adapter(scaling='rslora')
  result = add_adapters(PARAMS, [adapter], [-3.0])
  check_sum(result, weighted_sum([adapter], [-3.0]))
  assert jax.tree.map(jnp.shape, result[0]) == jax.tree.map(
    jnp.shape, adapter[0]
  )


@pytest.mark.parametrize('rank', [3, 12])
def test_with_a_rank_each_layer_is_approximated_best(rank):
  adapters, weights = make_mixed(), (1.0, -0.5, 0.25)
  trainable, spec = result = add_adapters(PARAMS, adapters, weights, rank=rank)
  assert (spec.rank, spec.scale) == (rank, 1.0)
  assert trainable['layers']['up']['kernel']['b'].shape == (3, rank, 16)
  found, exact = updates_of(result), weighted_sum(adapters, weights)
  for path, update in exact.items():
    values = np.linalg.svd(update, compute_uv=False)
    best = np.sqrt((values[..., rank:] ** 2).sum(-1))
    error = np.linalg.norm(found[path] - update, axis=(-2, -1))
    # Backward stable steps: each adds a few eps of the whole update.
    limit = best + 16 * EPS * np.linalg.norm(update, axis=(-2, -1))
    assert (error <= limit).all()


def test_the_sum_as_one_matrix_is_never_formed():
  node = {'a': jnp.zeros((256, 2)), 'b': jnp.zeros((2, 256))}
  params, spec = {'kernel': jnp.zeros((256, 256))}, LoraSpec(rank=2)

  def add(node):
    adapters = [({'kernel': node}, spec)] * 2
    return add_adapters(params, adapters, [1.0, 2.0], rank=2)[0]

  jaxpr = str(jax.make_jaxpr(add)(node))
  assert '256,4' in jaxpr
  assert '256,256' not in jaxpr


def test_layers_that_none_changes_are_no_targets():
  first = make_adapter(0, targets=('layers/0/up/kernel',))
  second = make_adapter(1, targets=('layers/2/up/kernel',))
  _, spec = result = add_adapters(PARAMS, [first, second], [1.0, 2.0], rank=2)
  assert spec.targets == ('layers/0/up/kernel', 'layers/2/up/kernel')
  check_sum(result, weighted_sum([first, second], [1.0, 2.0]), 16 * EPS)
  np.testing.assert_array_equal(plan(spec)[1][UP].ranks, [2, 0, 2])


def test_axes_are_kept_where_specs_name_them_differently():
  names = (('.*up/kernel', 'layers | x -> y'), (OUT, 'layers | h d -> e'))
  first = make_adapter(0, targets=(UP,))
  second = make_adapter(1, targets=(UP, OUT), axes=names)
  _, spec = result = add_adapters(PARAMS, [first, second], [1.0, 1.0])
  assert spec.axes == (
    (UP, 'layers | in -> out'),
    (OUT, 'layers | h d -> e'),
  )
  check_sum(result, weighted_sum([first, second], [1.0, 1.0]))


def test_other_roles_of_the_same_kernel_are_refused():
  roles = ((OUT, 'layers | heads -> head_dim embed'),)
  first = make_adapter(0, targets=(OUT,))
  second = make_adapter(1, targets=(OUT,), axes=roles)
  with pytest.raises(AdapterError, match='no common form'):
    add_adapters(PARAMS, [first, second], [1.0, 1.0])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'variant': 'dora'}, "variant 'dora'.*merge it"),
    ({'init': 'pissa'}, "init 'pissa'.*--to=peft"),
    ({'init': 'olora'}, "init 'olora'.*--to=peft"),
    ({'init': 'loftq'}, "init 'loftq'.*--to=peft"),
    ({'train_full': ('norm/scale',)}, 'train_full=.*merge it'),
    ({'train_rows': {'embed/embedding': [1]}}, 'train_rows=.*merge it'),
  ],
)
def test_what_is_no_product_on_this_base_is_refused(fields, message):
  trainable, spec = make_adapter()
  other = trainable, dataclasses.replace(spec, **fields)
  with pytest.raises(AdapterError, match=rf'^adapters\[1\] has {message}'):
    add_adapters(PARAMS, [(trainable, spec), other], [1.0, 1.0])


@pytest.mark.parametrize(
  ('count', 'weights', 'message'),
  [
    (0, [], '0 adapters'),
    (1, [1.0, 2.0], '1 adapters and 2 weights'),
    (1, [float('nan')], 'weight nan is not finite'),
  ],
)
def test_weights_must_be_finite_and_one_for_each(count, weights, message):
  with pytest.raises(AdapterError, match=message):
    add_adapters(PARAMS, [make_adapter()] * count, weights)


def test_an_adapter_of_another_spec_is_refused():
  trainable, spec = make_adapter()
  wider = dataclasses.replace(spec, rank=3)
  with pytest.raises(AdapterError, match=r'16, 2\).* asks for .*16, 3\)'):
    add_adapters(PARAMS, [(trainable, wider)], [1.0])
  fewer = dataclasses.replace(spec, exclude=(OUT,))
  with pytest.raises(AdapterError, match=f'{OUT}/a.*does not train'):
    add_adapters(PARAMS, [(trainable, fewer)], [1.0])


def test_a_rank_that_no_kernel_can_use_is_refused():
  with pytest.raises(AdapterError, match=r'rank 13.*at most 12'):
    add_adapters(PARAMS, [make_adapter()], [1.0], rank=13)
  with pytest.raises(AdapterError, match=r'rank 14.*at most 12'):
    add_adapters(PARAMS, [make_adapter(rank=7)] * 2, [1.0, 1.0])
  with pytest.raises(ConfigError, match='rank is 0'):
    add_adapters(PARAMS, [make_adapter()], [1.0], rank=0)


@pytest.mark.parametrize(('kind', 'rank'), [('cat', None), ('svd', 3)])
def test_it_is_the_sum_that_peft_makes(kind, rank):
  weights, adapters = [0.75, 1.5], []
  model = peft.get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(12, 10)),
    peft.LoraConfig(target_modules=['0']),
  )
  layer = model.base_model.model[0]
  for r, lora_alpha in ((2, 6), (3, 8)):
    fields = {'r': r, 'lora_alpha': lora_alpha, 'target_modules': ['0']}
    config = peft.LoraConfig(**fields, init_lora_weights=False)
    model.add_adapter(f'of {r}', config)
    sides = (getattr(layer, f'lora_{x}')[f'of {r}'].weight for x in 'AB')
    a, b = (jnp.asarray(side.detach().numpy().T) for side in sides)
    spec = LoraSpec(rank=r, alpha=lora_alpha)
    adapters.append(({'kernel': {'a': a, 'b': b}}, spec))
  model.add_weighted_adapter(
    ['of 2', 'of 3'], weights, 'sum', kind, svd_rank=rank
  )
  expected = layer.get_delta_weight('sum').detach().numpy().T
  params = {'kernel': jnp.zeros((12, 10))}
  trainable, spec = add_adapters(params, adapters, weights, rank=rank)
  found = trainable['kernel']['a'] @ trainable['kernel']['b']
  assert spec.rank == (rank or 5)
  atol = 64 * EPS * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=atol)
