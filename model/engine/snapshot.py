"""Pictures off the device without stalling it: packed into one buffer there, copied beside the next step, read here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.engine.slots import Slots, send
from model.sampling.plan import COLUMNS, Plan


def as_bytes(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as diffusers rounds them. [n, C, H, W] float32 -> [n, H, W, C] uint8"""
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def pack(slots: Slots, shown: Sequence[int], checked: Sequence[int], floats: bool) -> Tensor:
    """What slots hold, one behind the other, on the device: of those shown, x clamped, if `floats`, then x and x0 as
    bytes; of them and of those that are only checked, in this order, whether x is finite. -> uint8"""
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
    """What was packed, as arrays."""

    x: NDArray[np.uint8]  # [m, H, W, C] of those shown
    x0: NDArray[np.uint8]  # [m, H, W, C]
    finite: NDArray[np.bool_]  # [n] of those shown and those checked
    floats: NDArray[np.float32] | None  # [m, C, H, W]


def unpack(
    packed: NDArray[np.uint8], shape: tuple[int, int, int], shown: Sequence[int], checked: Sequence[int], floats: bool
) -> Frames:
    """Views of what `pack` gives of these slots."""
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
    """Pictures of some slots on their way to the host, and of others only whether they are finite.

    `ready` may be asked at any time; `frames` only once it is true.
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
            self._arrived = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            self._arrived.record(stream)

    @property
    def ready(self) -> bool:
        """Whether everything has arrived."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> None:
        """Stand still until it has."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def frames(self) -> Frames:
        """What has arrived: views of memory that goes with them."""
        return unpack(self._host.numpy(), *self._layout)


def warm_up(slots: Slots) -> Iterator[None]:
    """Compiles every kernel that seats, moves and shows, before any sample is seated, and yields after each."""
    if not slots.by_kernels:
        return
    plan = Plan(np.zeros((1, len(COLUMNS))), np.zeros(2, np.int64))
    slots.seat(0, 0, plan, torch.zeros(slots.shape))
    yield
    slots.put_back(0, 0, plan, 0, slots.take(0))
    yield
    for floats in (False, True):
        pack(slots, [0], [], floats)
        yield
    slots.vacate(0, slots.capacity - 1)
    yield
    slots.clear(0)
