"""What a model takes of a device's memory: bounded before it is loaded, with no tensor allocated for it.

The net is built on the meta device, where tensors have shapes and no numbers, and a step of a full batch is played
there to see how much is alive at a time.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.card import ModelCard
from model.checkpoint import Model
from model.kernels import Conv
from model.slots import Slots
from model.unet import UNet

WORKSPACE = 1.5  # of what is alive in a step: what libraries take for themselves, and what fragments

SAMPLER = 8  # float32 numbers that its arithmetic holds for each of a picture, beside the net


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of a model: its number of weights, and the bytes that it takes at most."""

    parameters: int
    size_bytes: int


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made and not yet gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: set[int] = set()  # storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def footprint(card: ModelCard, slots: int, device: torch.device, dtype: torch.dtype) -> Footprint:
    """What the model will take, loaded: while it is read, its weights are there in float32 as well as in `dtype`."""
    with torch.device("meta"):
        net = UNet(card.architecture)
    count, T = sum(p.numel() for p in net.parameters()), card.process.schedule.T
    weights = (count + net.embedding_width * T) * (4 + dtype.itemsize)
    slot = batch_bytes(Slots(1, card.architecture.shape, T, device))
    return Footprint(count, weights + slots * slot + step_bytes(card, slots, dtype))


def resident_bytes(model: Model, slots: Slots) -> int:
    """What a loaded model holds of a device that does not tell: its net in every form, its table, its batch."""
    packed = [module.packed for module in model.net.modules() if isinstance(module, Conv) and module.packed is not None]
    weights = sum(t.numel() * t.element_size() for t in [*model.net.state_dict().values(), *packed, model.table])
    return weights + batch_bytes(slots) + step_bytes(model.card, slots.capacity, model.table.dtype)


def batch_bytes(slots: Slots) -> int:
    """A batch, and as much again: pictures that were unseated keep their state."""
    return 2 * sum(tensor.nbytes for tensor in vars(slots).values() if isinstance(tensor, Tensor))


def step_bytes(card: ModelCard, slots: int, dtype: torch.dtype) -> int:
    """What a step of a full batch takes for itself while it is made, at most."""
    with torch.no_grad(), torch.device("meta"):
        net = UNet(card.architecture).to(dtype)
        x = torch.empty(slots, *card.architecture.shape, dtype=dtype)
        embedding = torch.empty(slots, net.embedding_width, dtype=dtype)
        with _Alive() as alive:
            net(x, embedding)
    return int(WORKSPACE * (alive.most + SAMPLER * 4 * x.numel()))
