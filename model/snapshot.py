"""Pictures off the device without stalling it: converted there, copied beside the next step, read once here."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_bytes(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as diffusers rounds them. [n, C, H, W] float32 -> [n, H, W, C] uint8"""
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Snapshot:
    """Tensors on their way to the host. `ready` may be asked at any time; `arrays` only once it is true."""

    def __init__(self, tensors: list[Tensor], stream: "torch.cuda.Stream | None") -> None:
        self._arrived: torch.cuda.Event | None = None
        if stream is None:
            self._tensors = [tensor.clone() for tensor in tensors]
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, tensor in zip(self._tensors, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
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

    def arrays(self) -> list[NDArray[np.generic]]:
        """The tensors as numpy arrays, in the order they were given."""
        return [tensor.numpy() for tensor in self._tensors]
