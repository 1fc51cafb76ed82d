"""What a model takes of a device's memory: bounded before it is loaded, with no tensor allocated for it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.checkpoint.card import ModelCard
from model.checkpoint.load import Model
from model.engine.slots import Slots
from model.nets.activations import alive
from model.nets.build import build
from model.nets.config import Architecture
from model.nets.cpu import CpuNet, size_bytes, sizes_up_to
from model.nets.lucidrains_config import LucidArchitecture

WORKSPACE = 1.5  # of what is alive in a step: what libraries take for themselves, and what fragments
SAMPLER = 8  # float32 numbers that its arithmetic holds for each of a picture, beside the net
COMPILED_BYTES = 16 << 20  # of OpenVINO's for each size of batch, whatever the net: machine code most of all


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of a model: its number of weights, and the bytes that it takes at most."""

    parameters: int
    size_bytes: int


def footprint(card: ModelCard, slots: int, device: torch.device, dtype: torch.dtype) -> Footprint:
    """What the model will take, loaded or while it is being loaded: its weights are there in float32 as well then, and
    on a CPU three times: torch's, those that OpenVINO converts, and those of the net that is compared with torch."""
    with torch.device("meta"):
        net = build(card.architecture)
    count, T = sum(p.numel() for p in net.parameters()), card.process.schedule.T
    batch = batch_bytes(Slots(1, card.architecture.shape, T, device))
    if device.type == "cpu":
        table, float32 = 4 * net.embedding_width * T, torch.float32
        checked = 4 * count + cpu_bytes(card.architecture, count, 1, float32)
        grown = cpu_bytes(card.architecture, count, slots, dtype)
        return Footprint(count, table + slots * batch + max(checked, grown))
    weights = (count + net.embedding_width * T) * (4 + dtype.itemsize)
    return Footprint(count, weights + slots * (batch + picture_bytes(card.architecture, dtype)))


def resident_bytes(model: Model, slots: Slots) -> int:
    """What a loaded model holds of a device that does not tell, once its net has grown to a full batch."""
    arch, table, net = model.card.architecture, model.table.numel() * model.table.element_size(), model.net
    dtype = net.dtype if isinstance(net, CpuNet) else model.table.dtype
    if not isinstance(net, CpuNet) or net.note is not None:  # torch has one copy of the weights, for any batch
        return table + batch_bytes(slots) + size_bytes(1, arch, model.parameters, dtype)
    return table + batch_bytes(slots) + cpu_bytes(arch, model.parameters, slots.capacity, dtype)


def cpu_bytes(arch: Architecture | LucidArchitecture, parameters: int, slots: int, dtype: torch.dtype) -> int:
    """A net on a CPU, grown: OpenVINO keeps the weights it was given, in float32, and each size of batch has weights
    and working memory of its own."""
    sizes = sizes_up_to(slots, arch, parameters, dtype)
    return 4 * parameters + sum(COMPILED_BYTES + size_bytes(size, arch, parameters, dtype) for size in sizes)


def batch_bytes(slots: Slots) -> int:
    """A batch, and as much again: pictures that were unseated keep their state, and plans their rows on a GPU."""
    return 2 * sum(
        tensor.numel() * tensor.element_size() for tensor in vars(slots).values() if isinstance(tensor, Tensor)
    )


def picture_bytes(arch: Architecture | LucidArchitecture, dtype: torch.dtype) -> int:
    """What a step takes for itself while it is made, for each picture in it, at most."""
    pixels, itemsize = arch.height * arch.width, int(dtype.itemsize)
    return math.ceil(WORKSPACE * (itemsize * alive(arch) + SAMPLER * 4 * arch.in_channels * pixels))
