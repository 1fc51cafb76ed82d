"""Guided pictures: two slots, one picture, by the formula of classifier-free guidance."""

from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from model.checkpoint.load import Model
from model.engine.engine import Engine
from model.engine.events import Failed, Finished, Request
from model.engine.memory import NARROW, REASON
from model.engine.runner import prepared
from model.nets.unet import UNet
from model.sampling.plan import plan, resolve
from model.sampling.reference import sample_alone
from model.sampling.schedule import Thresholding, Variance
from tests.model.tiny import (
    ARCHITECTURE,
    PROCESS,
    FunctionNet,
    T,
    a_plan,
    a_request,
    card,
    endings,
    function_model,
    pictures,
    quick_engine,
    run,
)

LABELS, NULL = 5, 4


def reads_label(x: Tensor, k: Tensor) -> Tensor:
    """A net to which the label, added to k, says which part of the picture is noise."""
    return x * (0.3 + 0.02 * torch.sin(3.0 * k))[:, None, None, None]


def alone(request: Request) -> Tensor:
    """The picture of a request by the reference sampler, unrounded. -> [C, H, W]"""

    def net(label: int) -> Any:
        return lambda x, k: reads_label(x, k + label)

    label = request.labels[0] if request.labels else 0
    *_, (x, _) = sample_alone(net(label), request.plan, request.seed, ARCHITECTURE.shape, unlabelled=net(NULL))
    return x[0].clamp(-1, 1)


def guided(id: str, label: int, steps: int = 6, seed: int = 1, **choices: Any) -> Request:
    """A request for a guided picture of a label."""
    return a_request(id, seed=seed, plan=a_plan(steps, **choices), labels=(label, NULL), wants_floats=True)


GUIDED = [
    guided("twice", 1, guidance=2.0),
    guided("against it", 2, guidance=0.0),
    guided("between two levels", 3, T, guidance=3.0, guidance_interval=(20, 10)),
    guided("solver", 0, sampler="dpmpp", order=3, guidance=1.5),
    guided("from torch", 3, noise="torch", guidance=1.5),
]
PLAIN = [
    a_request("told a label", 5, seed=3, labels=(2,), wants_floats=True),
    a_request("told none", 4, seed=4, labels=(NULL,), wants_floats=True),
]


def test_a_guided_picture_is_that_of_the_formula_beside_any_others() -> None:
    events = run(quick_engine(6, reads_label, LABELS), *GUIDED, *PLAIN)

    made = {event.id: event.floats for event in events if isinstance(event, Finished)}
    for request in (*GUIDED, *PLAIN):
        torch.testing.assert_close(torch.from_numpy(made[request.id]), alone(request), atol=1e-5, rtol=0)


@pytest.mark.parametrize("learned", [False, True], ids=["thresholded", "learned variance"])
def test_guidance_comes_before_thresholding_and_leaves_a_learned_variance_as_it_is(learned: bool) -> None:
    thresholding = None if learned else Thresholding(0.8, 3.0)
    variance: Variance = "learned" if learned else "small"
    process = replace(PROCESS, learned_variance=learned, variance=variance, thresholding=thresholding)
    arch = replace(ARCHITECTURE, out_channels=2 if learned else 1)

    def net(x: Tensor, k: Tensor) -> Tensor:
        out = reads_label(x, k)
        return torch.cat([out, torch.cos(7.0 * out)], 1) if learned else out

    model = Model(card(arch, process), cast(UNet, FunctionNet(net, arch, LABELS)), function_model(net, LABELS).table)
    table = plan(process, replace(resolve(process, "ddpm", 9), guidance=3.0))
    asked = a_request("guided", seed=5, plan=table, labels=(1, NULL), wants_floats=True)
    (made,) = [event for event in run(Engine(prepared(model, 4)), asked, *PLAIN) if event.id == "guided"]
    told = [lambda x, k, label=label: net(x, k + label) for label in (1, NULL)]
    *_, (x, _) = sample_alone(told[0], table, 5, ARCHITECTURE.shape, thresholding, unlabelled=told[1])

    assert isinstance(made, Finished) and made.floats is not None
    torch.testing.assert_close(torch.from_numpy(made.floats), x[0].clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_guided_picture_takes_two_slots_and_is_shown_once() -> None:
    engine = quick_engine(3, reads_label, LABELS)
    engine.submit(guided("a", 1, 4, guidance=2.0, seed=7))
    engine.submit(guided("b", 1, 4, guidance=2.0, seed=8))
    engine.step()

    assert (engine.stats.seated, engine.stats.waiting, engine.stats.sample_steps) == (2, 1, 2)
    assert engine.progress == [("a", 1)]


def test_both_slots_go_with_a_cancelled_picture_and_those_that_move_into_them_are_joined_again() -> None:
    engine, others = (
        quick_engine(6, reads_label, LABELS),
        [guided("b", 2, 9, guidance=2.0), guided("c", 3, 9, guidance=3.0)],
    )
    for request in (guided("a", 1, 9, guidance=2.0), *others):
        engine.submit(request)
    engine.step()
    engine.cancel("a")
    events = run(engine)

    assert engine.scheduler.slots == []
    made = {event.id: event.floats for event in events if isinstance(event, Finished)}
    assert set(made) == {"b", "c"}
    for request in others:
        torch.testing.assert_close(torch.from_numpy(made[request.id]), alone(request), atol=1e-5, rtol=0)


def test_a_preempted_guided_picture_comes_to_the_same_bytes() -> None:
    long, urgent = guided("long", 1, T, guidance=2.0), a_request("urgent", 5, labels=(0,), rank=-5.0)
    undisturbed = pictures(run(quick_engine(2, reads_label, LABELS), long))
    engine = quick_engine(2, reads_label, LABELS)
    engine.submit(long)
    for _ in range(4):
        engine.step()
    engine.submit(urgent)
    engine.step()

    assert [id for id, _ in engine.progress] == ["urgent"]
    assert pictures(run(engine))["long"] == undisturbed["long"]


def test_two_plain_pictures_give_way_to_a_guided_one_of_lower_rank() -> None:
    engine = quick_engine(2, reads_label, LABELS)
    for seed in (1, 2):
        engine.submit(a_request(seed, 20, seed=seed, labels=(0,)))
    engine.step()
    engine.submit(a_request("urgent", plan=a_plan(3, guidance=2.0), labels=(1, NULL), rank=-5.0))
    events = run(engine)

    assert endings(events)[0] == ("Finished", "urgent") and len(endings(events)) == 3


def test_a_guided_picture_that_is_not_finite_fails_once() -> None:
    engine = quick_engine(4, lambda x, k: torch.where(k[:, None, None, None] > 100, torch.nan, x), 200)
    events = run(
        engine, a_request("sick", plan=a_plan(3, guidance=2.0), labels=(150, 0)), a_request("well", labels=(1,))
    )

    assert sorted(endings(events)) == [("Failed", "sick"), ("Finished", "well")]


def test_a_guided_picture_needs_two_slots() -> None:
    with pytest.raises(ValueError, match="takes two slots, and there is one"):
        quick_engine(1, reads_label, LABELS).submit(GUIDED[0])


def test_when_memory_has_left_one_slot_guided_pictures_fail_and_others_are_made() -> None:
    engine: Engine = quick_engine(2, reads_label, LABELS)
    usual = engine.runner.step

    def step(bucket: int) -> None:
        if bucket == 2:
            raise torch.OutOfMemoryError("two are too many")
        usual(bucket)

    engine.runner.step = step  # type: ignore[method-assign]
    alone = run(engine, GUIDED[0], a_request("late", labels=(NULL,)))
    run(engine, *(a_request(id, labels=(NULL,)) for id in "ab"))
    later = run(engine, GUIDED[1], a_request("last", labels=(NULL,)))

    assert alone[-1] == Failed("twice", REASON) and endings(alone)[:-1] == [("Finished", "late")]
    assert later[0] == Failed("against it", NARROW) and endings(later)[1:] == [("Finished", "last")]


def test_the_other_slot_of_a_guided_picture_holds_the_same_bits() -> None:
    engine = quick_engine(2, reads_label, LABELS)
    engine.submit(guided("a", 1, 9, guidance=2.5, sampler="dpmpp_sde"))
    for _ in range(5):
        engine.step()
        slots = engine.runner.slots
        for tensor in (slots.x, slots.x0, slots.history):
            assert torch.equal(tensor[0], tensor[1])


def test_a_picture_that_is_preempted_in_the_round_that_seats_it_comes_to_its_bytes() -> None:
    random = Random(3)
    requests = [
        guided(str(i), i % 4, random.randint(2, 12), i, guidance=1.5)
        if random.random() < 0.5
        else a_request(str(i), random.randint(2, 12), seed=i, labels=(i % 4,))
        for i in range(120)
    ]
    requests = [replace(each, owner=random.choice("abcd"), rank=random.choice([0.0, 1.0, 2.0])) for each in requests]
    alone, together, events, waiting = (
        quick_engine(2, reads_label, LABELS),
        quick_engine(3, reads_label, LABELS),
        [],
        [*requests],
    )
    while waiting or together.busy:
        for _ in range(random.choice([0, 0, 1, 4])):
            if waiting:
                together.submit(waiting.pop())
        events += together.step()

    made = pictures(events)
    assert len(made) == len(requests)
    assert [each.id for each in requests if pictures(run(alone, each))[each.id] != made[each.id]] == []


def test_one_shortage_of_memory_leaves_room_for_a_guided_picture() -> None:
    engine, failures = quick_engine(4, reads_label, LABELS), iter([True])
    engine.runner.admitted = [4]
    usual = engine.runner.step

    def step(bucket: int) -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("once")
        usual(bucket)

    engine.runner.step = step  # type: ignore[method-assign]
    events = run(engine, GUIDED[0], GUIDED[1])

    assert [type(event) for event in events] == [Finished, Finished]
