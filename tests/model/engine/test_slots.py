"""The batch on the device: seating, moving, preempting, clearing, and the noise."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.engine.readout import as_bytes, pack, unpack
from model.engine.slots import Seating, Slots
from model.engine.step import denoise
from model.sampling.noise import INITIAL, TorchNoise, gaussian
from model.sampling.table import K
from tests.model.tiny import CPU, T, a_plan, function_model

SHAPE = (1, 8, 8)


def x_T(seed: int) -> Tensor:
    """The noise that the picture of this seed starts from."""
    return gaussian(torch.tensor([seed]), torch.tensor([0]), SHAPE, INITIAL)[0]


def state(slots: Slots, slot: int) -> list[Tensor]:
    """Everything a slot holds."""
    tensors = (*floats(slots), slots.rows, slots.cursor, slots.last, slots.seed)
    return [tensor[slot].clone() for tensor in tensors]


def floats(slots: Slots) -> tuple[Tensor, ...]:
    """The tensors in which a NaN could hide."""
    return slots.x, slots.x0, slots.given, slots.history, slots.ahead


def test_a_seated_picture_starts_from_the_noise_of_its_seed() -> None:
    slots = Slots(2, SHAPE, T, CPU)
    slots.seat(1, 42, a_plan(5), slots.draw_initial([42])[0])

    assert torch.equal(slots.x[1], x_T(42))
    assert [int(column[1]) for column in (slots.cursor, slots.last, slots.seed)] == [0, 5, 42]


def test_with_torch_noise_it_starts_from_the_first_draw_of_the_generator() -> None:
    slots = Slots(1, SHAPE, T, CPU)
    slots.seat(0, 42, a_plan(5, noise="torch"), TorchNoise(42, SHAPE).draw())

    assert torch.equal(slots.x[0], torch.randn(SHAPE, generator=torch.Generator().manual_seed(42)))


def test_the_rows_behind_a_short_plan_are_zero_even_after_a_long_one() -> None:
    slots = Slots(1, SHAPE, T, CPU)
    slots.seat(0, 1, a_plan(T), slots.draw_initial([1])[0])
    slots.seat(0, 2, a_plan(3), slots.draw_initial([2])[0])

    assert slots.rows[0, :3, K].tolist() == (a_plan(3).t[:-1] - 1).tolist()
    assert not slots.rows[0, 3:].any()


@pytest.mark.parametrize("leave", ["cleared", "sat over"])
def test_nothing_of_a_tenant_of_nan_survives(leave: str) -> None:
    slots, fresh = Slots(1, SHAPE, T, CPU), Slots(1, SHAPE, T, CPU)
    slots.seat(0, 1, a_plan(T), slots.draw_initial([1])[0])
    for tensor in floats(slots):
        tensor.fill_(torch.nan)
    if leave == "cleared":
        slots.clear(0)
        assert all(not tensor.any() for tensor in floats(slots))

    slots.seat(0, 7, a_plan(4), slots.draw_initial([7])[0])
    fresh.seat(0, 7, a_plan(4), fresh.draw_initial([7])[0])
    assert all(torch.equal(a, b) for a, b in zip(state(slots, 0), state(fresh, 0), strict=True))


def test_a_free_slot_stays_as_it_is_while_others_step() -> None:
    model, slots = function_model(), Slots(2, SHAPE, T, CPU)
    slots.seat(0, 1, a_plan(4), slots.draw_initial([1])[0])
    slots.seat(1, 2, a_plan(4), slots.draw_initial([2])[0])
    slots.clear(1)
    before = state(slots, 1)
    with torch.inference_mode():
        denoise(model.net, model.table, slots, 2)

    assert all(torch.equal(a, b) for a, b in zip(before, state(slots, 1), strict=True))


def test_the_cursor_stops_on_the_row_of_zeros_behind_the_last() -> None:
    model, slots = function_model(), Slots(1, SHAPE, T, CPU)
    slots.seat(0, 1, a_plan(T), slots.draw_initial([1])[0])
    with torch.inference_mode():
        for _ in range(T + 2):
            denoise(model.net, model.table, slots, 1)

    assert slots.cursor.tolist() == [T]
    assert not slots.x.any()


def test_a_move_carries_everything() -> None:
    slots = Slots(3, SHAPE, T, CPU)
    slots.seat(0, 1, a_plan(9), slots.draw_initial([1])[0])
    slots.seat(2, 2, a_plan(4), slots.draw_initial([2])[0])
    slots.draw_ahead([2], 2, 0)
    slots.given[2], slots.x0[2], slots.cursor[2] = 0.5, 0.25, 3
    slots.history[2] = torch.randn(slots.history[2].shape)
    before = state(slots, 2)
    slots.move(2, 0)

    assert all(torch.equal(a, b) for a, b in zip(before, state(slots, 0), strict=True))


def test_seating_several_pictures_equals_seating_them_one_by_one() -> None:
    together, apart = Slots(3, SHAPE, T, CPU), Slots(3, SHAPE, T, CPU)
    brought, plan = TorchNoise(5, SHAPE).draw(), a_plan(4, noise="torch")
    together.seat_all([Seating(2, 2**63 - 1, a_plan(9)), Seating(0, 5, plan, brought), Seating(1, 8, a_plan(1))])
    apart.seat(0, 5, plan, brought)
    apart.seat(1, 8, a_plan(1), x_T(8))
    apart.seat(2, 2**63 - 1, a_plan(9), x_T(2**63 - 1))

    for slot in range(3):
        assert all(torch.equal(a, b) for a, b in zip(state(together, slot), state(apart, slot), strict=True))


def test_a_vacated_slot_gets_its_successor_whose_own_slot_keeps_nothing() -> None:
    slots = Slots(3, SHAPE, T, CPU)
    for slot in range(3):
        slots.seat(slot, slot, a_plan(4 + slot), x_T(slot))
    middle, last = state(slots, 1), state(slots, 2)
    slots.vacate(0, 2)

    assert all(torch.equal(a, b) for a, b in zip(last, state(slots, 0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(middle, state(slots, 1), strict=True))
    assert all(not tensor[2].any() for tensor in floats(slots))
    assert not slots.rows[2, slots.cursor[2]].any()

    slots.vacate(1, None)
    assert all(not tensor[1].any() for tensor in floats(slots))
    assert all(torch.equal(a, b) for a, b in zip(last, state(slots, 0), strict=True))


def test_a_preempted_picture_is_resumed_at_its_step() -> None:
    slots = Slots(2, SHAPE, T, CPU)
    slots.seat(0, 3, a_plan(9), x_T(3))
    slots.draw_ahead([0], 3, 0)
    slots.x0[0], slots.given[0], slots.cursor[0] = 0.25, 0.5, 4
    slots.history[0] = torch.randn(slots.history[0].shape)
    before, saved = state(slots, 0), slots.save(0)
    slots.clear(0)
    slots.resume(Seating(1, 3, a_plan(9)), 4, saved)

    assert all(torch.equal(a, b) for a, b in zip(before, state(slots, 1), strict=True))


def test_only_finiteness_is_packed_of_a_slot_that_is_checked() -> None:
    slots = Slots(4, SHAPE, T, CPU)
    slots.x.copy_(torch.randn(slots.x.shape))
    slots.x0.copy_(torch.randn(slots.x.shape))
    slots.x[1, 0, 3, 5] = torch.inf
    frames = unpack(pack(slots, [2, 0], [3, 1], True).numpy(), SHAPE, [2, 0], [3, 1], True)

    assert np.array_equal(frames.x, as_bytes(slots.x[[2, 0]]).numpy())
    assert np.array_equal(frames.x0, as_bytes(slots.x0[[2, 0]]).numpy())
    assert frames.floats is not None and np.array_equal(frames.floats, slots.x[[2, 0]].clamp(-1, 1).numpy())
    assert frames.finite.tolist() == [True, True, True, False]
    assert pack(slots, [], [0, 1, 2, 3], False).tolist() == [1, 0, 1, 1]


def test_noise_drawn_ahead_is_the_noise_drawn_step_by_step() -> None:
    slots = Slots(2, SHAPE, T, CPU)
    slots.seat(0, 2**63 - 1, a_plan(T), slots.draw_initial([2**63 - 1])[0])
    slots.seat(1, 6, a_plan(T), slots.draw_initial([6])[0])
    for step in range(T):
        if step % slots.ahead_steps == 0:
            slots.draw_ahead([0], 2**63 - 1, step)
            slots.draw_ahead([1], 6, step)
        slots.cursor[:] = step
        assert torch.equal(torch.as_tensor(slots.noise(2)), gaussian(slots.seed, slots.cursor, SHAPE))


def test_a_large_picture_draws_the_noise_of_few_steps_ahead_and_of_one_at_least() -> None:
    assert Slots(1, (3, 256, 256), 4, CPU).ahead_steps == 1
    assert Slots(1, (3, 64, 64), 4, CPU).ahead_steps == 2
    assert Slots(1, SHAPE, 4, CPU).ahead_steps == 32
