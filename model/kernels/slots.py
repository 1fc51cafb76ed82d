"""The Triton kernels between two steps on a GPU, which seat, vacate and show samples with one launch each.

`model.engine.slots` and `model.engine.readout` have in plain torch what they compute. Numbers that differ from launch
to launch are either in a tensor on the device or not specialised, so that no slot or seed needs a kernel of its own.
Importing this module imports Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.noise import gaussian
from model.sampling.noise import INITIAL
from model.sampling.table import COLUMNS, HISTORY

BLOCK = 1024  # numbers in a program
ORDER = 7  # slot, seed, steps, index of its first row in the tables, current step, index of its pictures or -1, label


@triton.jit
def _seat(
    orders, pictures, tables, x, x0, given, history, rows, cursor, last, seed, label, labelled, unlabelled, numbers,
    elements,
    KEPT: tl.constexpr, HISTORY: tl.constexpr, DOMAIN: tl.constexpr, COLUMNS: tl.constexpr, ORDER: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    at = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    order = orders + tl.program_id(1) * ORDER
    slot, key, steps = tl.load(order), tl.load(order + 1), tl.load(order + 2)
    table, source = tables + tl.load(order + 3) * COLUMNS, tl.load(order + 5)
    row = tl.load(table + at, mask=at < steps * COLUMNS, other=0.0)
    tl.store(rows + slot * numbers + at, row, mask=at < numbers)
    if block == 0:
        tl.store(cursor + slot, tl.load(order + 4))
        tl.store(last + slot, steps)
        tl.store(seed + slot, key)
        tl.store(label + slot, tl.load(order + 6))
        tl.store(labelled + slot, 0)
        tl.store(unlabelled + slot, 0)
    if block * (4 * QUADS) < elements:
        inside, there = at < elements, slot * elements + at  # in [C, H, W]
        nothing = tl.zeros((4 * QUADS,), tl.float32)
        if source < 0:
            first = gaussian(key, tl.zeros((), tl.int32), block * QUADS + tl.arange(0, QUADS), DOMAIN)
            tl.store(x + there, first, mask=inside)
        else:
            kept = pictures + source * (KEPT * elements) + at
            tl.store(x + there, tl.load(kept, mask=inside), mask=inside)
        past = history + slot * (HISTORY * elements) + at
        if KEPT == 3 + HISTORY:
            kept = pictures + source * (KEPT * elements) + at
            tl.store(x0 + there, tl.load(kept + elements, mask=inside), mask=inside)
            tl.store(given + there, tl.load(kept + 2 * elements, mask=inside), mask=inside)
            for i in tl.static_range(HISTORY):
                tl.store(past + i * elements, tl.load(kept + (3 + i) * elements, mask=inside), mask=inside)
        else:
            tl.store(x0 + there, nothing, mask=inside)
            tl.store(given + there, nothing, mask=inside)
            for i in tl.static_range(HISTORY):
                tl.store(past + i * elements, nothing, mask=inside)


def seat(
    orders: Tensor, pictures: Tensor | None, tables: Tensor, state: tuple[Tensor, ...], columns: tuple[Tensor, ...]
) -> None:
    """Writes new or preempted pictures to cleared slots.

    orders: [n, 7] int64, pictures: [m, 1 or 6, C, H, W], tables: [R, 16], state: x, x0, given [B, C, H, W],
    history [B, 3, C, H, W] and rows [B, S + 1, 16], columns: cursor, last, seed, label, labelled, unlabelled [B]
    """
    x, x0, given, history, rows = state
    elements, numbers = x[0].numel(), rows[0].numel()
    _seat[(triton.cdiv(max(elements, numbers), BLOCK), len(orders))](
        orders, x if pictures is None else pictures, tables, x, x0, given, history, rows, *columns, numbers, elements,
        KEPT=1 if pictures is None else pictures.shape[1], HISTORY=HISTORY, DOMAIN=INITIAL, COLUMNS=len(COLUMNS),
        ORDER=ORDER, QUADS=BLOCK // 4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _carry(state, source, target, at, inside, MOVES: tl.constexpr, CLEARS: tl.constexpr):
    """Moves a block of one slot's numbers to another slot, or clears it, or both."""
    if MOVES:
        tl.store(state + target + at, tl.load(state + source + at, mask=inside), mask=inside)
    if CLEARS:
        tl.debug_barrier()  # until the whole block has been read: another thread may write a number
        tl.store(state + source + at, tl.zeros(at.shape, tl.float32), mask=inside)


@triton.jit(do_not_specialize=["source", "target"])
def _vacate(
    x, x0, given, history, rows, cursor, last, seed, label, labelled, unlabelled, source, target, numbers, elements,
    HISTORY: tl.constexpr, MOVES: tl.constexpr, CLEARS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    source, target = source.to(tl.int64), target.to(tl.int64)
    _carry(x, source * elements, target * elements, at, at < elements, MOVES, CLEARS)
    _carry(x0, source * elements, target * elements, at, at < elements, MOVES, CLEARS)
    _carry(given, source * elements, target * elements, at, at < elements, MOVES, CLEARS)
    for i in tl.static_range(HISTORY):
        there, here = (target * HISTORY + i) * elements, (source * HISTORY + i) * elements
        _carry(history, here, there, at, at < elements, MOVES, CLEARS)
    _carry(rows, source * numbers, target * numbers, at, at < numbers, MOVES, False)
    if block == 0:
        if MOVES:
            tl.store(cursor + target, tl.load(cursor + source))
            tl.store(last + target, tl.load(last + source))
            tl.store(seed + target, tl.load(seed + source))
            tl.store(label + target, tl.load(label + source))
            tl.store(labelled + target, tl.load(labelled + source))
            tl.store(unlabelled + target, tl.load(unlabelled + source))
        if CLEARS:
            tl.debug_barrier()
            tl.store(cursor + source, tl.load(last + source))
            tl.store(labelled + source, 0)
            tl.store(unlabelled + source, 0)


def vacate(
    state: tuple[Tensor, ...], columns: tuple[Tensor, ...], source: int, target: int | None, clears: bool
) -> None:
    """Copies the picture in `source` to `target`, if there is one, and then frees `source`, if it `clears`.

    state: x, x0, given [B, C, H, W], history [B, 3, C, H, W] and rows [B, S + 1, 16]
    columns: cursor, last, seed, label, labelled, unlabelled [B]
    """
    elements, numbers, moves = state[0][0].numel(), state[4][0].numel(), target is not None
    _vacate[(triton.cdiv(max(elements, numbers if moves else 0), BLOCK),)](
        *state, *columns, source, source if target is None else target, numbers, elements,
        HISTORY=HISTORY, MOVES=moves, CLEARS=clears, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _grey(value):
    """A number of [-1, 1] as one of 256 levels. Above 2^23 float32 has no halves: adding it rounds, half to even."""
    level = value * 0.5 + 0.5
    level = tl.where(level > 0.0, tl.where(level < 1.0, level, 1.0), 0.0) * 255.0
    return ((level + 8388608.0) - 8388608.0).to(tl.int32).to(tl.uint8)


@triton.jit(do_not_specialize=["shown"])
def _show(x, x0, slots, out, shown, elements, pixels, channels, FLOATS: tl.constexpr, BLOCK: tl.constexpr):
    sample, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)  # in [H, W, C]
    inside = at < elements
    planar = (at % channels) * pixels + at // channels  # in [C, H, W]
    here = tl.load(slots + sample) * elements + planar
    value = tl.load(x + here, mask=inside, other=0.0)
    shown = shown.to(tl.int64)
    greys = out + shown * elements * (4 if FLOATS else 0)
    finite = tl.min((tl.abs(value) < float("inf")).to(tl.int32), axis=0)
    tl.store(greys + 2 * shown * elements + sample * tl.num_programs(0) + block, finite.to(tl.uint8))
    if sample < shown:
        predicted = tl.load(x0 + here, mask=inside, other=0.0)
        tl.store(greys + sample * elements + at, _grey(value), mask=inside)
        tl.store(greys + (shown + sample) * elements + at, _grey(predicted), mask=inside)
        if FLOATS:
            clamped = tl.where(value > 1.0, 1.0, tl.where(value < -1.0, -1.0, value))  # NaN stays NaN
            tl.store(out.to(tl.pointer_type(tl.float32)) + sample * elements + planar, clamped, mask=inside)


def show(x: Tensor, x0: Tensor, slots: Tensor, shown: int, floats: bool) -> Tensor:
    """The buffer of `model.engine.readout.pack`, with a flag for each block of a sample's numbers instead of one.

    x, x0: [B, C, H, W], slots: [n] int64, of which the first `shown` are shown -> uint8
    """
    C, H, W = x.shape[1:]
    elements, blocks = C * H * W, triton.cdiv(C * H * W, BLOCK)
    size = shown * elements * (6 if floats else 2) + len(slots) * blocks
    out = torch.empty(size, dtype=torch.uint8, device=x.device)
    _show[(blocks, len(slots))](
        x, x0, slots, out, shown, elements, H * W, C, FLOATS=floats, BLOCK=BLOCK, enable_fp_fusion=False
    )
    return out
