"""Signals: the first of a kind ends a training at a checkpoint, the second at once."""

import os
import signal

import pytest
import torch

from model.train.stop import Stop
from tests.model.train.worlds import trainer


def test_a_signal_of_another_process_is_none_of_this_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduced(told: torch.Tensor, _: object) -> None:
        told[0] = signal.SIGTERM

    monkeypatch.setattr("torch.distributed.all_reduce", reduced)
    stop, made = Stop(), trainer()
    made.world = 2
    with stop.listening():
        assert stop.agree(made)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)

    assert stop.signal == signal.SIGTERM
