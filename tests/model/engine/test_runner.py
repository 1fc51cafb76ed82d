"""The runner on a CPU: the batch sizes it uses, and those in which it finds a picture's bits to be the same."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import model.engine.exactness
from model.engine.runner import prepared, ranges, usual_buckets
from model.engine.slots import Slots
from model.engine.step import denoise
from model.sampling.noise import gaussian
from model.sampling.plan import SAMPLERS
from model.sampling.table import COLUMNS, A, B, C, D, E, G, H, K, M, N, P, Q, S, U
from tests.model.tiny import CPU, T, a_plan, a_request, function_model, halve, pictures, quick_engine, run, tiny_model

Function = Callable[[Tensor, Tensor], Tensor]


def different_in(*sizes: int) -> Function:
    """A net whose last bits are others in batches of these sizes, as a library may choose another kernel there."""
    return lambda x, k: halve(x, k) * (1 + 2**-20 * (len(x) in sizes))


def nosy(x: Tensor, k: Tensor) -> Tensor:
    """A net whose last bits depend on the other pictures."""
    return halve(x, k) + 2**-20 * x.mean(dim=0, keepdim=True)


def seat_dependent(x: Tensor, k: Tensor) -> Tensor:
    """A net whose last bits depend on the slot."""
    return halve(x, k) * (1 + 2**-20 * torch.arange(len(x))[:, None, None, None])


@pytest.mark.parametrize("slots", [1, 2, 15, 16, 17, 24, 33, 64, 100, 256, 1024])
def test_the_usual_buckets_rise_to_the_number_of_slots_and_pad_by_an_eighth_at_most(slots: int) -> None:
    buckets = usual_buckets(slots)

    assert buckets == sorted(set(buckets))
    assert buckets[-1] == slots
    assert all(b - a <= max(1, a / 8) for a, b in zip(buckets, buckets[1:], strict=False))


@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])  # torch: as on a GPU without Triton
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_the_formula_of_the_plan_row_by_row(
    batch: int, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library is torch:
        for conversion in ("array", "tensor"):
            monkeypatch.setattr(Slots, conversion, lambda slots, each: each)
    model, slots = function_model(), Slots(3, (1, 8, 8), T, CPU)
    slots.library = library
    generator = torch.Generator().manual_seed(5)
    slots.rows[:, 0] = torch.rand(3, len(COLUMNS), generator=generator, dtype=torch.float64).float()
    slots.rows[:, 0, K] = torch.tensor([0.0, 11.0, 29.0])
    for tensor in (slots.x, slots.given, slots.history, slots.ahead):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    slots.last[:] = 1
    x, past, given, z = slots.x.clone(), slots.history.clone(), slots.given.clone(), slots.ahead[:, 0].clone()
    with torch.inference_mode():
        denoise(model.net, model.table, slots, batch)

    for i in range(batch):
        row = slots.rows[i, 0]
        out = halve(x[i : i + 1], row[K : K + 1])[0]
        x0 = (row[P] * x[i] + row[Q] * out).clamp(-row[C], row[C])
        before = row[H] * past[i, 0] + row[G] * past[i, 1] + row[D] * past[i, 2]
        after = row[M] * x0 + before + row[N] * x[i] + row[E] * out + row[S] * z[i] + row[U] * given[i]
        history = torch.stack([row[A] * x0 + row[B] * x[i], past[i, 0], past[i, 1]])
        assert torch.allclose(slots.x0[i], x0, atol=1e-6)
        assert torch.allclose(slots.x[i], after, atol=1e-5)
        assert torch.allclose(slots.history[i], history, atol=1e-6)
    assert slots.cursor.tolist() == [int(i < batch) for i in range(3)]


def test_the_smallest_admitted_bucket_is_taken() -> None:
    runner = prepared(function_model(), 8, buckets=[2, 4, 8])

    assert [runner.bucket_for(count) for count in range(1, 9)] == [2, 2, 4, 4, 8, 8, 8, 8]


def test_a_full_batch_always_has_a_bucket() -> None:
    assert prepared(function_model(), 6, buckets=[2, 4]).bucket_for(6) == 6


def test_a_net_that_treats_all_samples_alike_uses_every_bucket() -> None:
    runner = prepared(function_model(), 5)

    assert (runner.exact, runner.exact_buckets) == (True, [1, 2, 3, 4, 5])


def test_a_bucket_in_which_bits_differ_is_padded_away() -> None:
    runner = prepared(function_model(different_in(1, 3)), 5)

    assert (runner.exact, runner.exact_buckets) == (True, [2, 4, 5])
    assert (runner.bucket_for(1), runner.bucket_for(3)) == (2, 4)


def test_without_the_promise_every_bucket_is_used() -> None:
    runner = prepared(function_model(different_in(1, 3)), 5, exact=False)

    assert (runner.exact, runner.admitted) == (False, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("net", [nosy, seat_dependent])
def test_a_net_that_depends_on_other_pictures_or_slots_is_not_exact(net: Function) -> None:
    runner = prepared(function_model(net), 6)

    assert not runner.exact
    assert runner.bucket_for(6) == 6


def test_a_picture_alone_equals_that_in_a_batch_when_a_bucket_is_padded_away() -> None:
    requests = [a_request(i, 3 + i, seed=i) for i in range(4)]
    alone = {i: pictures(run(quick_engine(4, different_in(1, 3)), r))[i] for i, r in enumerate(requests)}

    assert pictures(run(quick_engine(4, different_in(1, 3)), *requests)) == alone


NOTES: list[tuple[Function, str | None]] = [
    (halve, None),
    (different_in(3), None),
    (different_in(1, 2, 3), "a picture alone takes a batch of 4, since bits are others in batches of 1-3"),
    (different_in(1, 4), "a picture alone takes a batch of 2, since bits are others in batches of 1,4"),
    (nosy, "nothing is promised: a picture's bits depend on who is in the batch, or on its slot"),
]


@pytest.mark.parametrize(("net", "note"), NOTES)
def test_the_cost_of_the_promise_is_noted_and_logged_in_one_line(
    net: Function, note: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        runner = prepared(function_model(net), 5)

    assert runner.note == note
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == ([("WARNING", f"tiny: {note}")] if note else [])


def test_a_runner_that_promises_nothing_has_no_note() -> None:
    runner = prepared(function_model(different_in(1)), 5, exact=False)

    assert (runner.note, runner.bits) == (None, "")


@pytest.mark.parametrize(("numbers", "words"), [([], "none"), ([3], "3"), ([1, 2, 3, 4, 6, 8, 9], "1-4,6,8-9")])
def test_batch_sizes_are_written_as_ranges(numbers: list[int], words: str) -> None:
    assert ranges(numbers) == words


# The digest of the check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_starts_that_compute_alike_have_one_hash(dtype: torch.dtype) -> None:
    first, second = (prepared(tiny_model(dtype), 6).bits for _ in range(2))

    assert first == second
    assert len(first) == 8 and int(first, 16) >= 0


def test_a_start_in_which_a_library_chose_another_kernel_has_another_hash() -> None:
    """All batch sizes agree, so that only the hash shows it."""
    runners = [prepared(function_model(net), 5) for net in (halve, lambda x, k: halve(x, k) * (1 + 2**-20))]

    assert [runner.exact_buckets for runner in runners] == [[1, 2, 3, 4, 5]] * 2
    assert runners[0].bits != runners[1].bits


def test_a_version_whose_sampler_has_other_rows_has_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = prepared(tiny_model(), 2).bits
    monkeypatch.setitem(SAMPLERS, "greedy", SAMPLERS["ddim"])

    assert prepared(tiny_model(), 2).bits != before


def test_a_machine_that_draws_other_noise_has_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = prepared(function_model(), 3).bits
    monkeypatch.setattr(model.engine.exactness, "gaussian", lambda *how: gaussian(*how) * (1 + 2**-22))

    assert prepared(function_model(), 3).bits != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_real_net_is_exact_in_batches_that_keep_the_bits_of_the_full_one(
    dtype: torch.dtype,
) -> None:
    """Which they are is up to the processor and the libraries for it; the full batch is always among them."""
    model = tiny_model(dtype)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype, memory_format=torch.channels_last)
    full = model.net(x, model.table[:6])
    same = [
        b
        for b in range(1, 7)
        if all(torch.equal(model.net(x[i : i + b], model.table[i : i + b]), full[i : i + b]) for i in range(7 - b))
    ]

    assert prepared(model, 6).exact_buckets == same


def test_the_check_leaves_no_trace() -> None:
    slots, fresh = prepared(tiny_model(), 4).slots, Slots(4, (1, 8, 8), T, CPU)

    for name in ("x", "x0", "given", "history", "ahead", "rows"):
        assert torch.equal(getattr(slots, name), getattr(fresh, name)), name
    assert torch.equal(slots.cursor, slots.last)


def test_only_the_slots_of_the_bucket_move() -> None:
    runner = prepared(function_model(), 4)
    for slot in range(4):
        runner.slots.seat(slot, slot, a_plan(4), runner.slots.draw_initial([slot])[0])
    before = runner.slots.x.clone()
    runner.step(2)

    assert runner.slots.cursor.tolist() == [1, 1, 0, 0]
    assert torch.equal(runner.slots.x[2:], before[2:])
    assert not torch.equal(runner.slots.x[:2], before[:2])
