"""What a comparison says, in words built from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from jlora.comparison.numbers import (
  Arm,
  Spread,
  loss_tolerance,
  sampling_error,
)

_UNITS = ((1e9, '.2f', 'GB'), (1e6, '.1f', 'MB'), (1e3, '.1f', 'kB'))
_WORTHWHILE = 0.95  # of LoRA's peak: above it, QLoRA saves next to nothing


def size(count: float) -> str:
  """Returns bytes in words, such as `1.61 GB`.

  Args:
    count: Bytes; 1 kB is 1,000 of them.
  """
  for unit, form, name in _UNITS:
    if count >= unit:
      return f'{count / unit:{form}} {name}'
  return f'{count:.0f} B'


def listed(words: Sequence[str]) -> str:
  """Returns words as a list in a sentence."""
  *most, last = words
  return f'{", ".join(most)} and {last}' if most else last


def answer(arms: Sequence[Arm], record: Mapping[str, Any]) -> list[str]:
  """Returns the paragraphs that answer when to use which.

  Args:
    arms: From `read_arms`.
    record: What comparison.json holds.
  """
  by_kind = {arm.kind: arm for arm in reversed(arms)}  # the first of a kind
  full, lora, qlora = (by_kind.get(k) for k in ('full', 'lora', 'qlora'))
  paragraphs = [_memory(arms, full, lora, qlora), _speed(arms), _quality(arms)]
  if full and (lora or qlora):
    paragraphs.append(_adapters_or_all(full, lora or qlora))
  if lora and qlora:
    paragraphs.append(_four_bits_or_not(lora, qlora))
  paragraphs.append(_limits(arms, record))
  return paragraphs


def _memory(
  arms: Sequence[Arm], full: Arm | None, lora: Arm | None, qlora: Arm | None
) -> str:
  peaks = listed([f'{size(a.compiled_peak)} ({a.label})' for a in arms])
  text = f'**Memory.** At its peak a step takes {peaks}.'
  if full and lora:
    text += (
      f' {lora.label} saves gradients and optimizer state'
      f' ({_training_bytes(lora)} in place of {_training_bytes(full)}), but no'
      ' activations.'
    )
  if lora and qlora:
    text += (
      f' {qlora.label} then saves on the base ({size(qlora.bytes["base"])} in'
      f' place of {size(lora.bytes["base"])}; the embedding stays as it is).'
    )
  return text


def _training_bytes(arm: Arm) -> str:
  return size(arm.bytes['gradients'] + arm.bytes['optimizer'])


def _speed(arms: Sequence[Arm]) -> str:
  times = listed([f'{a.step_seconds:.3g} s ({a.label})' for a in arms])
  text = f'**Speed.** The median step took {times}.'
  first, *others = arms
  if first.flops and all(arm.flops for arm in others):
    ratios = listed(
      [f'{arm.flops / first.flops:.2f}× ({arm.label})' for arm in others]
    )
    text += f' By operations, beside {first.label}, it should be {ratios}.'
  return text


def _quality(arms: Sequence[Arm]) -> str:
  losses = listed([f'{a.loss.text(".3f")} ({a.label})' for a in arms])
  text = f'**Quality.** Held-out loss after training: {losses}.'
  if all('exact_match' in arm.answers for arm in arms):
    shares = listed([f'{_exact(a).text(".0%")} ({a.label})' for a in arms])
    text += (
      f' Exact match: {shares}. With {arms[0].scored} answers a run, two arms'
      f' can differ by {sampling_error(arms):.0%} by chance.'
    )
  return text


def _exact(arm: Arm) -> Spread:
  return arm.answers['exact_match'][1]


def _unlike(one: Arm, other: Arm) -> str:
  """Returns a sentence where exact match differs by more than chance."""
  if 'exact_match' not in one.answers or 'exact_match' not in other.answers:
    return ''
  gap = _exact(one).mean - _exact(other).mean
  if abs(gap) <= sampling_error([one, other]):
    return ''
  return (
    f' Its exact match is {"higher" if gap > 0 else "lower"} by'
    f' {100 * abs(gap):.0f} points, which is more than chance.'
  )


def _adapters_or_all(full: Arm, lora: Arm) -> str:
  gap = lora.loss.mean - full.loss.mean
  tolerance = loss_tolerance(full, lora)
  cost = (
    f'{lora.compiled_peak / full.compiled_peak:.2f} of the memory and'
    f' {lora.step_seconds / full.step_seconds:.2f} of the time a step'
  )
  file = f'{size(lora.file_bytes)} in place of {size(full.file_bytes)}'
  if gap > tolerance:
    return (
      f'**Use {full.label} fine-tuning** where quality decides and'
      f' {size(full.compiled_peak)} are there: its held-out loss is lower by'
      f' {gap:.3f} nats.{_unlike(full, lora)} {lora.label} takes {cost}, and'
      f' leaves a file of {file}: use it where that counts more.'
    )
  verdict = (
    f'is that of {full.label} fine-tuning to within {tolerance:.3f} nats'
  )
  if gap < -tolerance:
    verdict = (
      f'is lower than that of {full.label} fine-tuning by {-gap:.3f} nats, at'
      ' these learning rates'
    )
  return (
    f'**Use {lora.label} first:** its held-out loss {verdict}.'
    f'{_unlike(lora, full)} It takes {cost}, and leaves a file of {file}.'
  )


def _four_bits_or_not(lora: Arm, qlora: Arm) -> str:
  share = qlora.compiled_peak / lora.compiled_peak
  gap = qlora.loss.mean - lora.loss.mean
  tolerance = loss_tolerance(lora, qlora)
  if share > _WORTHWHILE:
    return (
      f'**Use {qlora.label}** for a larger base: here it takes {share:.2f} of'
      f" {lora.label}'s memory, which is no reason to store the base in 4 bits."
    )
  if gap > tolerance:
    price = f'it costs {gap:.3f} nats of held-out loss'
  elif gap < -tolerance:
    price = f'its held-out loss is even lower, by {-gap:.3f} nats'
  else:
    price = f'it costs no held-out loss to within {tolerance:.3f} nats'
  return (
    f'**Use {qlora.label}** where {lora.label} does not fit: it takes'
    f" {share:.2f} of {lora.label}'s memory, and {price}."
    f'{_unlike(qlora, lora)} The larger the base, the more it saves. Where'
    f' {lora.label} fits, stay with it: on a GPU, dequantizing makes each step'
    ' slower.'
  )


def _limits(arms: Sequence[Arm], record: Mapping[str, Any]) -> str:
  seeds = len(record['arms'][arms[0].name]['runs'])
  parts = ['**What this does not say.**']
  if seeds == 1:
    parts.append(
      'One seed gives no spread over runs: read small differences as none.'
    )
  if record['grid']:
    parts.append(
      'Learning rates were chosen on the held-out examples that the table'
      ' reports, which flatters every arm a little.'
    )
  else:
    parts.append(
      'Learning rates were given, not tuned arm by arm: any arm could gain from'
      ' a search of its own.'
    )
  parts.append(
    'It is one model and one task. Small models lose more to 4 bits than'
    ' large ones.'
  )
  return ' '.join(parts)
