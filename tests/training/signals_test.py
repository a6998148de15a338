import os
import signal

import pytest

from jlora.training.signals import StopRequest


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number):
  with StopRequest() as stop:
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested


def test_the_second_signal_leaves_at_once():
  with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested


def test_both_signals_are_given_back():
  before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  with StopRequest():
    pass
  after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  assert after == before
