"""Samples' states on their way off the device, which never stalls for them, and the events they become.

They are packed into one buffer there, which is copied to the host beside the next steps.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.engine.events import Event, Finished, Preview
from model.engine.sample import Sample
from model.engine.slots import Seating, Slots, send
from model.sampling.table import COLUMNS, Plan


def as_bytes(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as diffusers rounds them. [n, C, H, W] float32 -> [n, H, W, C] uint8"""
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def pack(slots: Slots, shown: Sequence[int], checked: Sequence[int], floats: bool) -> Tensor:
    """The contents of slots in one buffer on the device. -> uint8

    Of the slots `shown`: x clamped to [-1, 1] as float32, if `floats`; x as bytes; x0 as bytes. Of these and then of
    those `checked`: whether x is finite.
    """
    if slots.by_kernels:
        from model.kernels import slots as kernels

        return kernels.show(slots.x, slots.x0, send([*shown, *checked], slots.device), len(shown), floats)
    x = torch.stack([slots.x[slot] for slot in (*shown, *checked)])  # [n, C, H, W]
    parts = [x.isfinite().flatten(1).all(1).view(torch.uint8)]
    if shown:
        x, x0 = x[: len(shown)], torch.stack([slots.x0[slot] for slot in shown])  # [m, C, H, W] each
        parts = [as_bytes(x), as_bytes(x0), *parts]
        parts = [x.clamp(-1, 1).view(torch.uint8), *parts] if floats else parts
    return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True, slots=True)
class Frames:
    """The contents of a packed buffer, as arrays."""

    x: NDArray[np.uint8]  # [m, H, W, C] of the slots shown
    x0: NDArray[np.uint8]  # [m, H, W, C]
    finite: NDArray[np.bool_]  # [n] of the slots shown and then those checked
    floats: NDArray[np.float32] | None  # [m, C, H, W]


def unpack(
    packed: NDArray[np.uint8], shape: tuple[int, int, int], shown: Sequence[int], checked: Sequence[int], floats: bool
) -> Frames:
    """Views of a buffer that `pack` made of these slots. packed: on the host"""
    (C, H, W), m = shape, len(shown)
    size = m * C * H * W
    unrounded, x, x0, flags = np.split(packed, np.cumsum([4 * size * floats, size, size]))
    return Frames(
        x.reshape(m, H, W, C),
        x0.reshape(m, H, W, C),
        flags.reshape(m + len(checked), -1).min(axis=1).astype(np.bool_),
        unrounded.view(np.float32).reshape(m, C, H, W) if floats else None,
    )


class Snapshot:
    """Pictures of some slots in transit to the host, and of others only whether they are finite.

    `ready` may be read at any time; `frames` may be called once it is true, or after `wait`.
    """

    def __init__(
        self,
        slots: Slots,
        shown: Sequence[int],
        checked: Sequence[int],
        floats: bool,
        stream: "torch.cuda.Stream | None",
    ) -> None:
        self._layout = (slots.shape, shown, checked, floats)
        self._arrived: torch.cuda.Event | None = None
        buffer = pack(slots, shown, checked, floats)
        if stream is None:
            self._host = buffer
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
            self._host.copy_(buffer, non_blocking=True)
            buffer.record_stream(stream)
            self._arrived = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
            self._arrived.record(stream)

    @property
    def ready(self) -> bool:
        """Whether everything has arrived."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> None:
        """Blocks until everything has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def frames(self) -> Frames:
        """What has arrived, as views that keep its memory alive."""
        return unpack(self._host.numpy(), *self._layout)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sample's state as it was after `step` updates: one row of what a snapshot has brought."""

    sample: Sample
    step: int
    frames: Frames
    row: int

    @property
    def finite(self) -> bool:
        """Whether x has neither NaN nor infinity."""
        return bool(self.frames.finite[self.row])

    def events(self) -> Iterator[Event]:
        """The preview that the request asked for at this step, then the finished picture if this is its last one."""
        request, frames, row = self.sample.request, self.frames, self.row
        if self.step in request.frames:
            x = frames.x[row].copy() if request.shows_x else None
            x0 = frames.x0[row].copy() if request.shows_x0 and self.step > 0 else None
            yield Preview(request.id, self.step, x, x0)
        if self.step == request.plan.steps:
            floats = frames.floats[row].copy() if request.wants_floats and frames.floats is not None else None
            yield Finished(request.id, frames.x[row].copy(), floats)


@dataclass(slots=True, eq=False)
class _Pending:
    """A snapshot in transit, and the samples in its rows with their steps."""

    snapshot: Snapshot
    samples: list[Sample]
    steps: list[int]


@dataclass(slots=True)
class Readout:
    """Copies samples' states to the host beside the steps that follow."""

    slots: Slots
    stream: "torch.cuda.Stream | None" = None  # of the copies, on a GPU
    _pending: deque[_Pending] = field(default_factory=deque)

    def copy(self, shown: list[Sample], checked: list[Sample]) -> None:
        """Starts to copy the states of seated samples; of those `checked`, only whether they are finite."""
        if not shown and not checked:
            return
        floats = any(sample.ended and sample.request.wants_floats for sample in shown)
        slots = [sample.seat for sample in shown], [sample.seat for sample in checked]
        samples = [*shown, *checked]
        snapshot = Snapshot(self.slots, *slots, floats, self.stream)
        self._pending.append(_Pending(snapshot, samples, [sample.step for sample in samples]))

    def arrivals(self, wait: bool) -> Iterator[Arrival]:
        """The states that have arrived; all of them, if it may `wait`."""
        while self._pending:
            pending = self._pending[0]
            if wait:
                pending.snapshot.wait()
            elif not pending.snapshot.ready:
                return
            self._pending.popleft()
            frames = pending.snapshot.frames()
            for row, (sample, step) in enumerate(zip(pending.samples, pending.steps, strict=True)):
                yield Arrival(sample, step, frames, row)


def warm_up(slots: Slots) -> Iterator[None]:
    """Compiles every kernel that seats, moves and shows, before any sample is seated, and yields after each."""
    if not slots.by_kernels:
        return
    plan = Plan(np.zeros((1, len(COLUMNS))), np.zeros(2, np.int64))
    slots.seat(0, 0, plan, torch.zeros(slots.shape))
    yield
    slots.resume(Seating(0, 0, plan), 0, slots.save(0))
    yield
    for floats in (False, True):
        pack(slots, [0], [], floats)
        yield
    slots.vacate(0, slots.capacity - 1)
    yield
    slots.clear(0)
