"""Triton's kernels between two steps, beside the same in plain torch. Not collected by its name: `test_triton`
runs it, under Triton's interpreter on any machine, and on a GPU where there is one.

Each slot is full of NaN before a picture is seated, so that a number that is not written, or written elsewhere, shows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import model.engine.slots
import model.nets.layers
from model.engine.readout import Frames, Snapshot, pack, unpack, warm_up
from model.engine.slots import PlanCache, Seating, Slots
from model.sampling.noise import TorchNoise
from tests.model.kernels.world import DEVICE
from tests.model.tiny import T, a_plan

Shape = tuple[int, int, int]
SHAPES: dict[str, Shape] = {
    "one block": (1, 8, 8),
    "no four in a row": (3, 5, 7),
    "no whole block": (3, 29, 31),
    "one number": (1, 1, 1),
}
COLUMNS_OF_SLOTS = ("cursor", "last", "seed", "label", "labelled", "unlabelled")
STATE = ("x", "x0", "given", "history", "rows", *COLUMNS_OF_SLOTS)
SEEDS = [0, 1, 16, 2**31, 2**32 - 1, 2**32, 2**32 + 16, 0x1234567890ABCDEF, 2**63 - 1]


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is used on this device, even if it is a CPU."""
    monkeypatch.setattr(model.nets.layers, "TRITON_ON", frozenset({DEVICE.type}))


@contextmanager
def plain_torch() -> Iterator[None]:
    """Triton is used nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.nets.layers, "TRITON_ON", frozenset())
        yield


def ruin(capacity: int, shape: Shape) -> Slots:
    """Slots in which sick pictures sat, none the same as another."""
    slots = Slots(capacity, shape, T, DEVICE)
    slots.ahead = torch.zeros(capacity, 0, *shape, device=DEVICE)  # as on a GPU
    for tensor in (slots.x, slots.x0, slots.given, slots.history, slots.rows):
        tensor.fill_(torch.nan)
    for number, name in enumerate(COLUMNS_OF_SLOTS):
        column = getattr(slots, name)
        column.copy_(torch.arange(capacity) + 100 * number + 7)
    return slots


def lively(capacity: int, shape: Shape) -> Slots:
    """Slots in which every number is another."""
    slots, generator = ruin(capacity, shape), torch.Generator().manual_seed(0)
    for tensor in (slots.x, slots.x0, slots.given, slots.history, slots.rows):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return slots


def bits(slots: Slots, *, but: str = "") -> dict[str, list[Any]]:
    """All that slots hold, so that NaN equals NaN; without one of its tensors."""
    tensors = {name: getattr(slots, name).cpu() for name in STATE if name != but}
    return {name: (t.view(torch.int32) if t.is_floating_point() else t).tolist() for name, t in tensors.items()}


# Seating


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_seated_pictures_are_where_torch_would_put_them_and_nothing_else_changes(shape: Shape) -> None:
    ours, theirs = ruin(6, shape), ruin(6, shape)
    outside = a_plan(7, noise="torch")
    seatings = [
        Seating(4, 2**63 - 1, a_plan(T), label=9),
        Seating(0, 5, outside, TorchNoise(5, shape).draw()),
        Seating(5, 2**32, a_plan(1, "ddim")),
        Seating(2, 6, outside, TorchNoise(6, shape).draw()),
    ]
    ours.seat_all(seatings)
    with plain_torch():
        theirs.seat_all(seatings)

    assert bits(ours, but="x") == bits(theirs, but="x")
    assert torch.equal(ours.x[[0, 2]], theirs.x[[0, 2]])
    assert float((ours.x[[4, 5]] - theirs.x[[4, 5]]).abs().max()) < 1e-6
    assert ours.x[[1, 3]].isnan().all()


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 29, 31)])
def test_a_picture_starts_from_the_noise_of_its_seed_however_large(shape: Shape) -> None:
    slots = ruin(len(SEEDS), shape)
    slots.seat_all([Seating(slot, seed, a_plan(3)) for slot, seed in enumerate(SEEDS)])
    with plain_torch():
        expected = slots.draw_initial(SEEDS)

    assert float((slots.x - expected).abs().max()) < 1e-6
    assert slots.seed.tolist() == SEEDS
    assert len({tuple(x.flatten().tolist()) for x in slots.x}) == len(SEEDS)


def test_the_bits_of_x_T_depend_on_neither_company_nor_slot() -> None:
    together, alone = ruin(9, (3, 29, 31)), ruin(1, (3, 29, 31))
    together.seat_all([Seating(8 - slot, seed, a_plan(3)) for slot, seed in enumerate(SEEDS)])
    for slot, seed in enumerate(SEEDS):
        alone.seat_all([Seating(0, seed, a_plan(9))])
        assert torch.equal(alone.x[0], together.x[8 - slot])


def test_rows_behind_a_short_plan_are_zero_in_the_only_slot() -> None:
    slots = ruin(1, (1, 8, 8))
    for plan in (a_plan(T), a_plan(3), a_plan(1)):
        slots.seat(0, 1, plan, torch.ones(1, 8, 8))
        assert torch.equal(slots.rows[0, : plan.steps].cpu(), torch.tensor(plan.rows).float())
        assert not slots.rows[0, plan.steps :].any()


# Plans that are on the device already


def test_the_plan_cache_holds_the_plans_asked_for_whatever_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, uploads = ruin(3, (1, 1, 1)), list[int]()
    usual = model.engine.slots.upload

    def upload(target: Tensor, source: Tensor) -> None:
        uploads.append(len(target))
        usual(target, source)

    monkeypatch.setattr(model.engine.slots, "upload", upload)
    plans = [a_plan(steps) for steps in (T, T - 1, T - 2, 20, 12)]
    for chosen in [(0, 1, 2), (0, 0, 1), (3, 0, 4), (3, 3, 2), (1, 4, 2), (2, 1, 0)]:
        slots.seat_all([Seating(slot, 1, plans[number]) for slot, number in enumerate(chosen)])
        for slot, number in enumerate(chosen):
            rows = torch.tensor(plans[number].rows).float()
            assert torch.equal(slots.rows[slot, : len(rows)].cpu(), rows)

    assert uploads == [3 * T - 3, 20 + T + 12, T - 2, 12 + 2 * T - 3, 3 * T - 3]  # of 3 T rows; once nothing was needed


def test_rows_that_did_not_arrive_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, plan = ruin(1, (1, 1, 1)), a_plan(4)
    with monkeypatch.context() as patch:

        def upload(target: Tensor, source: Tensor) -> None:
            raise torch.OutOfMemoryError("out of memory")

        patch.setattr(model.engine.slots, "upload", upload)
        with pytest.raises(torch.OutOfMemoryError):
            slots.seat_all([Seating(0, 1, plan)])
    slots.seat_all([Seating(0, 1, plan)])

    assert torch.equal(slots.rows[0, :4].cpu(), torch.tensor(plan.rows).float())


def test_the_plan_cache_never_grows() -> None:
    cache = PlanCache(2 * T, DEVICE)
    for steps in [*range(1, T + 1)] * 3:
        plan = a_plan(steps)
        (start,) = cache.starts([plan])
        assert torch.equal(cache.rows[start : start + steps].cpu(), torch.tensor(plan.rows).float())
        assert sum(plan.steps for plan in cache._starts) <= len(cache.rows) == 2 * T


# Preempting and moving


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_preempted_picture_is_resumed_unchanged(shape: Shape) -> None:
    ours, theirs, plan = lively(4, shape), lively(4, shape), a_plan(9)
    ours.resume(Seating(3, 2**62 + 1, plan), 5, ours.save(1))
    with plain_torch():
        theirs.resume(Seating(3, 2**62 + 1, plan), 5, theirs.save(1))

    assert bits(ours) == bits(theirs)
    assert torch.equal(ours.x[3], ours.x[1]) and ours.cursor[3] == 5


def test_a_saved_state_does_not_change_with_its_slot() -> None:
    slots = lively(2, (1, 8, 8))
    kept, saved = slots.x0[1].clone(), slots.save(1)
    slots.clear(1)

    assert torch.equal(saved.pictures[1], kept)


@pytest.mark.parametrize("source", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_move_copies_the_whole_slot_and_changes_no_other(shape: Shape, source: int) -> None:
    ours, theirs = lively(4, shape), lively(4, shape)
    ours.move(source, 2)
    with plain_torch():
        theirs.move(source, 2)

    assert bits(ours) == bits(theirs)


@pytest.mark.parametrize("capacity", [1, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_nothing_of_a_sick_picture_is_left_in_a_slot_that_is_cleared(shape: Shape, capacity: int) -> None:
    ours, theirs = ruin(capacity, shape), ruin(capacity, shape)
    ours.clear(capacity - 1)
    with plain_torch():
        theirs.clear(capacity - 1)

    assert bits(ours) == bits(theirs)
    assert not any(tensor[-1].any() for tensor in (ours.x, ours.x0, ours.given, ours.history))


@pytest.mark.parametrize(("slot", "successor"), [(0, 3), (2, 3), (1, 2), (3, None)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_last_picture_moves_to_the_vacated_slot_and_its_own_is_freed(
    shape: Shape, slot: int, successor: int | None
) -> None:
    ours, theirs = lively(4, shape), lively(4, shape)
    ours.x[slot] = theirs.x[slot] = torch.nan
    ours.vacate(slot, successor)
    with plain_torch():
        theirs.vacate(slot, successor)

    assert bits(ours) == bits(theirs)
    assert ours.x.isfinite().all()


# Showing


def seen(slots: Slots, shown: list[int], checked: list[int], floats: bool) -> Frames:
    """The host's view."""
    return unpack(pack(slots, shown, checked, floats).cpu().numpy(), slots.shape, shown, checked, floats)


def as_lists(frames: Frames) -> list[Any]:
    """The same, to be compared: floats by their bits."""
    floats = None if frames.floats is None else frames.floats.view("int32").tolist()
    return [frames.x.tolist(), frames.x0.tolist(), frames.finite.tolist(), floats]


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize(("shown", "checked"), [([2], []), ([4, 0, 1], [3]), ([], [0, 1, 2, 3, 4]), ([3], [0, 1, 2])])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_pictures_are_shown_as_torch_rounds_them(
    shape: Shape, shown: list[int], checked: list[int], floats: bool
) -> None:
    slots = lively(5, shape)
    ours = as_lists(seen(slots, shown, checked, floats))
    with plain_torch():
        theirs = as_lists(seen(slots, shown, checked, floats))

    assert ours == theirs
    assert len(ours[0]) == len(shown) and ours[2] == [True] * len([*shown, *checked])


def test_halves_are_rounded_to_even_levels_and_numbers_beyond_the_range_to_its_ends() -> None:
    levels = torch.arange(256.0)
    near = [levels + 0.5, levels, torch.tensor([-1.0, 256.0, -1e30, 1e30, -0.0])]
    values = torch.cat(near) / 255 * 2 - 1
    beside = [values, torch.nextafter(values, torch.tensor(-2.0)), torch.nextafter(values, torch.tensor(2.0))]
    picture = torch.cat(beside)[None, None]  # [1, 1, N]
    slots = ruin(1, (1, 1, picture.numel()))
    slots.x[0], slots.x0[0] = picture.to(DEVICE), -picture.to(DEVICE)
    ours = as_lists(seen(slots, [0], [], True))
    with plain_torch():
        theirs = as_lists(seen(slots, [0], [], True))

    assert ours == theirs
    assert set(seen(slots, [0], [], False).x.flatten().tolist()) == set(range(256))


@pytest.mark.parametrize("evil", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1023, 1024, 2696])
def test_one_nan_is_found_in_the_right_picture(where: int, evil: float) -> None:
    slots = lively(4, (3, 29, 31))
    slots.x[2].view(-1)[where] = evil
    slots.x0[1] = torch.nan  # of no consequence

    assert seen(slots, [1, 2], [0, 3], True).finite.tolist() == [True, False, True, True]
    assert seen(slots, [3], [2, 1], False).finite.tolist() == [True, False, True]
    assert seen(slots, [], [2], False).finite.tolist() == [False]


def test_pictures_arrive_as_they_were_when_they_were_shown() -> None:
    slots = lively(2, (3, 5, 7))
    before = seen(slots, [1, 0], [], True)
    stream = torch.cuda.Stream() if DEVICE.type == "cuda" else None
    snapshot = Snapshot(slots, [1, 0], [], True, stream)
    slots.clear(0)
    slots.clear(1)
    snapshot.wait()

    assert snapshot.ready and as_lists(snapshot.frames()) == as_lists(before)


# Warming up


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_warm_up_leaves_free_slots(capacity: int) -> None:
    slots = Slots(capacity, (3, 5, 7), T, DEVICE)
    slots.ahead = torch.zeros(capacity, 0, 3, 5, 7, device=DEVICE)
    for _ in warm_up(slots):
        pass

    assert not any(tensor.any() for tensor in (slots.x, slots.x0, slots.given, slots.history))
    assert torch.equal(slots.cursor, slots.last)
    for slot in range(capacity):
        assert not slots.rows[slot, int(slots.cursor[slot])].any()


def test_seating_no_picture_launches_nothing() -> None:
    slots = lively(2, (1, 8, 8))
    before = bits(slots)
    slots.seat_all([])

    assert bits(slots) == before
