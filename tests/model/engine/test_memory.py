"""Exhausted memory makes the batch smaller and changes no picture."""

from typing import Any

import pytest
import torch

from model.engine.engine import Engine
from model.engine.events import Failed
from tests.model.engine.alone import MIXED, alone_picture
from tests.model.tiny import (
    a_request,
    pictures,
    quick_engine,
    run,
)


def exhausted_at(engine: Engine, least: int, at: str = "net") -> None:
    """From now on memory runs out in batches of at least so many: in the net, or when its work is done."""
    usual = engine.runner.step

    def step(bucket: int) -> None:
        if at == "end":
            usual(bucket)
        if bucket >= least:
            raise torch.OutOfMemoryError("out of memory")
        if at == "net":
            usual(bucket)

    engine.runner.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("bucket", [2, 3, 6])
@pytest.mark.parametrize("at", ["net", "end"])
def test_memory_that_runs_out_makes_the_batch_smaller_and_changes_no_picture(bucket: int, at: str) -> None:
    engine = quick_engine(6)
    exhausted_at(engine, bucket, at)
    events = run(engine, *MIXED)

    assert pictures(events) == {request.id: alone_picture(request) for request in MIXED}
    times = engine.stats.exhausted
    run(engine, *MIXED)
    assert (times, engine.stats.exhausted) == (7 - bucket, times)  # it is remembered


def test_a_picture_for_which_memory_never_suffices_fails_alone() -> None:
    engine = quick_engine(2)
    exhausted_at(engine, 1)

    assert run(engine, a_request("a"), a_request("b")) == [
        Failed("a", "memory ran out with this picture alone"),
        Failed("b", "memory ran out with this picture alone"),
    ]
    assert not engine.busy


def test_memory_that_runs_out_while_a_sample_is_preempted_costs_only_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, requests = quick_engine(2), [a_request("long", 9, seed=1), a_request("longer", 10, seed=2)]
    short = a_request("short", 2, seed=3)
    for request in requests:
        engine.submit(request)
    engine.step()
    with monkeypatch.context() as patch:

        def save(slot: int) -> None:
            raise torch.OutOfMemoryError("out of memory")

        patch.setattr(engine.runner.slots, "save", save)
        engine.submit(short)
        events = engine.step()
    events += run(engine)

    assert pictures(events) == {request.id: alone_picture(request) for request in [*requests, short]}


def test_memory_that_runs_out_while_samples_are_resumed_changes_no_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, requests = quick_engine(2), [a_request("long", 9, seed=1), a_request("longer", 10, seed=2)]
    for request in requests:
        engine.submit(request)
    for _ in range(4):
        engine.step()
    shorts = [a_request("short", 2, seed=3), a_request("shorter", 1, seed=4)]
    resume, failures = engine.runner.slots.resume, iter([torch.OutOfMemoryError("out of memory")])

    def run_out_once(*given: Any) -> None:
        for failure in failures:
            raise failure
        resume(*given)

    monkeypatch.setattr(engine.runner.slots, "resume", run_out_once)
    events = run(engine, *shorts)

    assert engine.stats.exhausted == 1
    assert pictures(events) == {request.id: alone_picture(request) for request in [*requests, *shorts]}
