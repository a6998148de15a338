"""Modules that know nothing of jlora: lifted, they equal what merge gives."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.core import tree
from jlora.core.axes import array_axes, roles_of

KEY = jax.random.key(0)


def filled(shapes):
  """Returns random arrays of the shapes and dtypes of a tree."""
  random = np.random.default_rng(0)

  def fill(leaf):
    return jnp.asarray(random.standard_normal(leaf.shape) / 3, leaf.dtype)

  return jax.tree.map(fill, shapes)


def normal(*shape):
  return filled(jax.ShapeDtypeStruct(shape, jnp.float32))


BTD, BTNH, EBD = normal(2, 5, 8), normal(2, 5, 3, 4), normal(3, 5, 8)
IMAGE, SEQUENCE = normal(2, 6, 6, 4), normal(2, 9, 4)
IDS = jnp.array([[0, 4, 10, 4, 1], [9, 9, 2, 3, 0]])


@dataclasses.dataclass(frozen=True)
class Case:
  """A function of params and inputs, and what its kernels' axes are for.

  Roles have a letter for each axis of the array: stacked, in or out.
  """

  apply: Callable[..., Any]
  params: Any
  inputs: tuple[Any, ...]
  roles: dict[str, str]


def later(make):
  """Puts a call off, so that only the cases that run are made."""
  return functools.partial(functools.partial, make)


@later
def linen(module, inputs, roles):
  keys = {'params': KEY, 'dropout': KEY}
  variables = jax.eval_shape(module.init, keys, inputs)
  rest = jax.tree.map(jnp.ones_like, {**variables, 'params': {}})

  def apply(params, inputs):
    return module.apply(
      {**rest, 'params': params},
      inputs,
      rngs={'dropout': KEY},
      mutable=['batch_stats'],
    )

  return Case(apply, filled(variables['params']), (inputs,), roles)


class Call(nn.Module):
  """Any function of its input that makes Linen modules."""

  fn: Callable[[Any], Any]

  @nn.compact
  def __call__(self, x):
    return self.fn(x)


def einsum(equation, inputs, shape, roles):
  def fn(x):
    return nn.Einsum(shape, equation, use_bias=False, name='layer')(x)

  return linen(Call(fn), inputs, {'layer/kernel': roles})


def tied(ids):
  embed = nn.Embed(11, 8, name='embed')
  return embed.attend(jnp.tanh(embed(ids)))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return nn.Dense(8, name='down')(nn.relu(nn.Dense(12, name='up')(x))), None


def scanned(axis, roles, block=Block):
  def fn(x):
    layers = nn.scan(
      block,
      variable_axes={'params': axis},
      split_rngs={'params': True},
      length=3,
    )
    return layers(name='layers')(x, None)[0]

  paths = ('layers/up/kernel', 'layers/down/kernel')
  return linen(Call(fn), BTD, dict.fromkeys(paths, roles))


def vmapped(module, *args, axis=0, in_axes=0):
  """Applies one copy of a module for each of three experts."""

  def fn(x):
    experts = nn.vmap(
      module,
      in_axes=in_axes,
      variable_axes={'params': axis},
      split_rngs={'params': True},
      axis_size=3,
    )
    return experts(*args, name='experts')(x)

  return Call(fn)


def with_statistics(x):
  x = nn.Conv(6, (3, 3), name='conv')(x)
  x = nn.BatchNorm(use_running_average=False, name='norm')(x)
  x = nn.Dropout(0.3, deterministic=False)(x)
  return nn.Dense(3, name='head')(x.mean((1, 2)))


@later
def of_nnx(make, inputs, roles, call=lambda model, x: model(x)):
  model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  graphdef, state, rest = nnx.split(model, nnx.Param, ...)
  params = filled(nnx.to_pure_dict(state))

  def apply(params, inputs):
    return call(nnx.merge(graphdef, params, rest), inputs)

  return Case(apply, params, (inputs,), roles)


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(8, 12, rngs=rngs)
    self.down = nnx.Linear(12, 8, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.up(x)))


def nnx_stack(rngs):
  return nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock))(rngs)


def nnx_pair(rngs):
  return nnx.List([NnxBlock(rngs), NnxBlock(rngs)])


def nnx_scan(turn):
  def call(layers, x):
    return nnx.scan(turn, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)

  return call


def one_layer(x, layer):
  return layer(x)


@later
def of_equinox(make, inputs, roles, call):
  model = equinox.filter_eval_shape(make, equinox.nn)
  shapes, static = equinox.partition(model, lambda leaf: hasattr(leaf, 'shape'))

  def apply(params, inputs):
    return call(lambda part: equinox.combine(part, static), params, inputs)

  return Case(apply, filled(shapes), (inputs,), roles)


def each_row(model, params, x):
  return jax.vmap(jax.vmap(model(params)))(x)


def each_image(model, params, x):
  return jax.vmap(model(params))(x)


def each_sequence(model, params, x):
  return jax.vmap(lambda x: model(params)(x, x, x))(x)


def each_layer(model, params, x):
  def turn(x, layer):
    return jax.vmap(jax.vmap(model(layer)))(x), None

  return jax.lax.scan(turn, x, params)[0]


def equinox_stack(layers):
  keys = jax.random.split(KEY, 3)
  return jax.vmap(lambda key: layers.Linear(8, 8, key=key))(keys)


@later
def plain(fn, shape, roles, *inputs):
  def apply(params, *inputs):
    return fn(params['w'], *inputs)

  return Case(apply, {'w': normal(*shape)}, inputs, {'w': roles})


def each_expert(w, x):
  return [jnp.tanh(x) @ w[i] for i in range(3)]


def each_third(w, x):
  return [jnp.tanh(x @ part) for part in jnp.split(w, 3, axis=1)]


def looped(w, x):
  return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)


def ragged(w, x):
  return jax.lax.ragged_dot(x, w, jnp.array([2, 0, 3]))


HEADS = {
  'query/kernel': 'ioo',
  'key/kernel': 'ioo',
  'value/kernel': 'ioo',
  'out/kernel': 'iio',
}
PROJECTIONS = ('query_proj', 'key_proj', 'value_proj', 'output_proj')
STACK = {'up/kernel': 'sio', 'down/kernel': 'sio'}
PAIR = {f'{i}/{part}/kernel': 'io' for i in range(2) for part in ('up', 'down')}
RECURRENT = {'SimpleCell_0/i/kernel': 'io', 'SimpleCell_0/h/kernel': 'io'}

# fmt: off
CASES = {
  'Dense': linen(nn.Dense(6), BTD, {'kernel': 'io'}),
  'DenseGeneral, heads out': linen(
    nn.DenseGeneral((3, 4)), BTD, {'kernel': 'ioo'}),
  'DenseGeneral, heads in': linen(
    nn.DenseGeneral(6, axis=(-2, -1)), BTNH, {'kernel': 'iio'}),
  'DenseGeneral, inputs apart': linen(
    nn.DenseGeneral((2, 3), axis=(1, -1)), BTNH, {'kernel': 'iioo'}),
  'DenseGeneral, batch_dims': linen(
    nn.DenseGeneral(6, batch_dims=(0,)), EBD, {'kernel': 'sio'}),
  'Einsum, heads first': einsum('btd,ndh->btnh', BTD, (3, 8, 4), 'oio'),
  'Einsum, kernel first': einsum('bsd,ckdh->cbskh', BTD, (2, 3, 8, 4), 'ooio'),
  'Einsum, heads summed': einsum('btnh,nhd->btd', BTNH, (3, 4, 8), 'iio'),
  'Einsum, out first': einsum('btd,fd->btf', BTD, (6, 8), 'oi'),
  'Einsum, experts': einsum('ebd,edf->ebf', EBD, (3, 8, 6), 'sio'),
  'Embed and attend': linen(Call(tied), IDS, {'embed/embedding': 'io'}),
  'Conv, one axis': linen(nn.Conv(6, (3,)), SEQUENCE, {'kernel': 'iio'}),
  'Conv, strided': linen(
    nn.Conv(6, (3, 3), strides=2), IMAGE, {'kernel': 'iiio'}),
  'Conv, grouped': linen(
    nn.Conv(6, (3, 3), feature_group_count=2), IMAGE, {'kernel': 'iiio'}),
  'Conv, dilated': linen(
    nn.Conv(6, (2, 2), kernel_dilation=2), IMAGE, {'kernel': 'iiio'}),
  'Conv, one by one': linen(nn.Conv(6, (1, 1)), IMAGE, {'kernel': 'iiio'}),
  'ConvTranspose': linen(
    nn.ConvTranspose(6, (3, 3), strides=(2, 2)), IMAGE, {'kernel': 'iiio'}),
  'ConvLocal': linen(nn.ConvLocal(6, (3,)), SEQUENCE, {'kernel': 'sio'}),
  'attention': linen(
    nn.MultiHeadDotProductAttention(4, qkv_features=8), BTD, HEADS),
  'scan': scanned(0, 'sio'),
  'scan, layers at axis 1': scanned(1, 'iso'),
  'scan of remat': scanned(0, 'sio', nn.remat(Block)),
  'RNN': linen(Call(lambda x: nn.RNN(nn.SimpleCell(6))(x)), BTD, RECURRENT),
  'vmap': linen(vmapped(nn.Dense, 6), EBD, {'experts/kernel': 'sio'}),
  'vmap, experts at axis 1': linen(
    vmapped(nn.Dense, 6, axis=1), EBD, {'experts/kernel': 'iso'}),
  'vmap, one input for all': linen(
    vmapped(nn.Dense, 6, in_axes=None), BTD, {'experts/kernel': 'oio'}),
  'vmap of Conv': linen(
    vmapped(nn.Conv, 6, (3,)), normal(3, 2, 9, 4), {'experts/kernel': 'oiio'}),
  'batch statistics and dropout': linen(
    Call(with_statistics), IMAGE, {'conv/kernel': 'iiio', 'head/kernel': 'io'}),

  'nnx.Linear': of_nnx(
    functools.partial(nnx.Linear, 8, 6), BTD, {'kernel': 'io'}),
  'nnx.LinearGeneral, heads out': of_nnx(
    functools.partial(nnx.LinearGeneral, 8, (3, 4)), BTD, {'kernel': 'ioo'}),
  'nnx.LinearGeneral, heads in': of_nnx(
    functools.partial(nnx.LinearGeneral, (3, 4), 6, axis=(-2, -1)),
    BTNH, {'kernel': 'iio'}),
  'nnx.LinearGeneral, batch_axis': of_nnx(
    functools.partial(nnx.LinearGeneral, 8, 6, batch_axis={0: 3}),
    EBD, {'kernel': 'sio'}),
  'nnx.Einsum': of_nnx(
    functools.partial(nnx.Einsum, 'btd,ndh->btnh', (3, 8, 4)),
    BTD, {'kernel': 'oio'}),
  'nnx.Embed and attend': of_nnx(
    functools.partial(nnx.Embed, 11, 8), IDS, {'embedding': 'io'},
    lambda embed, ids: embed.attend(jnp.tanh(embed(ids)))),
  'nnx.Conv': of_nnx(
    functools.partial(nnx.Conv, 4, 6, (3, 3), strides=2),
    IMAGE, {'kernel': 'iiio'}),
  'nnx.ConvTranspose': of_nnx(
    functools.partial(nnx.ConvTranspose, 4, 6, (3, 3), strides=2),
    IMAGE, {'kernel': 'iiio'}),
  'nnx.MultiHeadAttention': of_nnx(
    functools.partial(nnx.MultiHeadAttention, 4, 8, decode=False), BTD, HEADS),
  'nnx.scan': of_nnx(nnx_stack, BTD, STACK, nnx_scan(one_layer)),
  'nnx.scan of nnx.remat': of_nnx(
    nnx_stack, BTD, STACK, nnx_scan(nnx.remat(one_layer))),
  'nnx.vmap': of_nnx(
    nnx_stack, EBD, STACK, nnx.vmap(lambda layer, x: layer(x))),
  'nnx.jit': of_nnx(
    nnx_pair, BTD, PAIR, nnx.jit(lambda pair, x: pair[1](pair[0](x)))),

  'equinox.nn.Linear': of_equinox(
    lambda layers: layers.Linear(8, 6, key=KEY), BTD, {'weight': 'oi'},
    each_row),
  'equinox.nn.Embedding': of_equinox(
    lambda layers: layers.Embedding(11, 8, key=KEY), IDS, {'weight': 'io'},
    each_row),
  'equinox.nn.Conv2d': of_equinox(
    lambda layers: layers.Conv2d(6, 4, 3, groups=2, key=KEY),
    IMAGE, {'weight': 'oiii'}, each_image),
  'equinox.nn.MultiheadAttention': of_equinox(
    lambda layers: layers.MultiheadAttention(4, 8, key=KEY),
    BTD, {f'{name}/weight': 'oi' for name in PROJECTIONS}, each_sequence),
  'equinox.nn.Linear, scanned': of_equinox(
    equinox_stack, BTD, {'weight': 'soi'}, each_layer),

  'transposed': plain(lambda w, x: x @ w.T, (6, 8), 'oi', BTD),
  'used twice': plain(lambda w, x: jnp.tanh(x @ w) @ w, (8, 8), 'io', BTD),
  'in a loop': plain(looped, (8, 8), 'io', BTD),
  'split': plain(each_third, (8, 6), 'io', BTD),
  'experts in turn': plain(each_expert, (3, 8, 6), 'sio', BTD),
  'an expert chosen': plain(
    lambda w, x, i: x @ w[i], (3, 8, 6), 'sio', BTD, jnp.int32(1)),
  'ragged_dot': plain(ragged, (3, 8, 6), 'sio', BTD[0]),
}
# fmt: on


def normalized(x):
  return nn.WeightNorm(nn.Dense(6, name='dense'))(x)


# What no rule covers, by the operation that is named.
UNCOVERED = {
  'mul': linen(Call(normalized), BTD, {'dense/kernel': 'io'}),
  'concatenate': linen(
    Call(lambda x: nn.RNN(nn.OptimizedLSTMCell(6))(x)),
    BTD,
    {'OptimizedLSTMCell_0/hf/kernel': 'io'},
  ),
  'rev': linen(
    nn.ConvTranspose(6, (3, 3), transpose_kernel=True),
    IMAGE,
    {'kernel': 'iioi'},
  ),
  'gather': linen(
    vmapped(nn.Embed, 11, 8), IDS[:, :3].T, {'experts/embedding': 'sio'}
  ),
}


@pytest.fixture(scope='module')
def build(quick_jit):
  """Returns a case, its specs, and its loss through merge, compiled."""

  @functools.cache
  def make(name):
    case = {**CASES, **UNCOVERED}[name]()
    axes = jlora.infer_axes(case.apply, case.params, *case.inputs)
    fields = {'targets': tuple(map(re.escape, case.roles)), 'axes': axes}
    spec = jlora.LoraSpec(rank=2, alpha=3.0, **fields)
    quant = jlora.QuantSpec(block_size=4, **fields)
    merged = value_and_grad(case.apply, jlora.merge, spec)
    return case, spec, quant, quick_jit(merged)

  return make


def value_and_grad(apply, join, spec):
  """Returns value, gradient of what is trained and gradient of the inputs."""

  def loss(trainable, inputs, frozen):
    outputs = apply(join(frozen, trainable, spec), *inputs)
    return sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(outputs))

  return jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)


def letters_of(roles):
  """Returns what each axis of the array is for, one letter each."""
  sides = zip('sio', (roles.stacked, roles.inputs, roles.outputs), strict=True)
  letters = ''.join(letter * len(names) for letter, names in sides)
  return ''.join(letters[k] for k in array_axes(roles.order, len(letters)))


@pytest.mark.parametrize('name', CASES)
def test_infer_axes_reads_what_each_axis_is_for(name, build):
  case, spec, *_ = build(name)
  leaves = tree.leaves_by_path(case.params)
  found = {
    path: letters_of(roles_of(path, leaves[path].shape, spec.axes))
    for path in case.roles
  }
  assert found == case.roles
  for pattern, _ in spec.axes:
    assert any(re.fullmatch(pattern, path) for path in case.roles), pattern


@pytest.mark.parametrize('quantized', [False, True], ids=['plain', 'nf4'])
@pytest.mark.parametrize('name', CASES)
def test_lifted_equals_merged_in_value_and_gradient(
  name, quantized, build, quick_jit, assert_near
):
  case, spec, quant, merged = build(name)
  shapes = jax.eval_shape(lambda x: x, case.params)
  _, trainable = jlora.partition(KEY, shapes, spec)
  trainable = filled(trainable)
  lifted = jlora.lift(case.apply, on_missing='error')

  @quick_jit
  def run(trainable, inputs, params):
    frozen = jlora.quantize(params, quant) if quantized else params
    ours = value_and_grad(lifted, jlora.combine, spec)
    return ours(trainable, inputs, frozen), jlora.dequantize(frozen)

  ours, dense = run(trainable, case.inputs, case.params)
  assert_near(ours, merged(trainable, case.inputs, dense))


@pytest.mark.parametrize('operation', UNCOVERED)
def test_what_no_rule_covers_is_merged_and_named(
  operation, build, quick_jit, assert_near
):
  case, spec, _, merged = build(operation)
  shapes = jax.eval_shape(lambda x: x, case.params)
  _, trainable = jlora.partition(KEY, shapes, spec)
  args = (filled(trainable), case.inputs, case.params)
  lifted = quick_jit(
    value_and_grad(jlora.lift(case.apply), jlora.combine, spec)
  )
  (path,) = case.roles
  with pytest.warns(UserWarning, match=f"'{operation}'.*'0/{path}'"):
    assert_near(lifted(*args), merged(*args))


def test_a_layer_that_a_scan_carries_on_is_merged(assert_near):
  def fn(params, x):
    def turn(before, kernel):
      return kernel, x @ before

    return jax.lax.scan(turn, jnp.ones((8, 8)), params['w'])

  spec = jlora.LoraSpec(rank=2, targets='w', axes={'w': 'layers | in -> out'})
  frozen, trainable = jlora.partition(KEY, {'w': normal(3, 8, 8)}, spec)
  trainable = filled(trainable)
  with pytest.warns(UserWarning, match="'scan'.*'0/w'"):
    ours = jlora.lift(fn)(jlora.combine(frozen, trainable, spec), BTD)
  assert_near(ours, fn(jlora.merge(frozen, trainable, spec), BTD))


class WithState(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(self.conv(x)))


def test_an_nnx_model_gives_its_new_state_back(quick_jit, assert_near):
  graphdef, state, rest = nnx.split(WithState(nnx.Rngs(0)), nnx.Param, ...)
  params = nnx.to_pure_dict(state)

  def apply(params, rest, x):
    model = nnx.merge(graphdef, params, rest)
    y = model(x)
    new = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])
    return y, new['norm'], new['dropout']['rngs']['count']

  axes = jlora.infer_axes(apply, params, rest, IMAGE)
  spec = jlora.LoraSpec(rank=2, axes=axes)
  frozen, trainable = jlora.partition(KEY, params, spec)
  lifted = jlora.lift(apply, on_missing='error')

  @quick_jit
  def both(trainable, rest):
    lazy = jlora.combine(frozen, trainable, spec)
    merged = jlora.merge(frozen, trainable, spec)
    return lifted(lazy, rest, IMAGE), apply(merged, rest, IMAGE)

  assert_near(*both(filled(trainable), rest))
