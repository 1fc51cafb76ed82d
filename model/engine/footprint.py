"""How much memory of a device a model takes: an upper bound before it is loaded, without allocating a tensor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.checkpoint.card import ModelCard
from model.checkpoint.load import Model
from model.engine.slots import Slots
from model.nets.activations import alive, size_bytes, sizes_up_to
from model.nets.build import build
from model.nets.cpu import CpuNet
from model.nets.lucidrains_config import AnyArchitecture

WORKSPACE = 1.5  # times the live tensors of a step: the libraries' own memory, and fragmentation
SAMPLER = 8  # float32 numbers that the sampler's arithmetic holds for each number of a picture
SELECTION = 22  # and the quantile of dynamic thresholding: x0, |x0|, and a sort of them with its indices
COMPILED_BYTES = 16 << 20  # OpenVINO's for each batch size of any net: machine code for the most part


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model's number of weights, and the bytes it takes at most."""

    parameters: int
    size_bytes: int


def footprint(card: ModelCard, slots: int, device: torch.device, dtype: torch.dtype) -> Footprint:
    """What the model takes at most, loaded or while it is loaded.

    During the load its weights exist in float32 as well, on a CPU three times: torch's, OpenVINO's constants, and those
    of the compiled net that is compared with torch.
    """
    with torch.device("meta"):
        net = build(card.architecture)
    count, T = sum(p.numel() for p in net.parameters()), card.process.schedule.T
    rows = T + net.labels
    batch = batch_bytes(Slots(1, card.shape, T, device))
    if device.type == "cpu":
        table, float32 = 4 * net.embedding_width * rows, torch.float32
        checked = 4 * count + cpu_bytes(card.architecture, count, 1, float32)
        grown = cpu_bytes(card.architecture, count, slots, dtype)
        return Footprint(count, table + slots * batch + max(checked, grown))
    weights = (count + net.embedding_width * rows) * (4 + dtype.itemsize)
    sampler = SAMPLER + (SELECTION if card.process.thresholding else 0)
    return Footprint(count, weights + slots * (batch + picture_bytes(card.architecture, dtype, sampler)))


def resident_bytes(model: Model, slots: Slots) -> int:
    """What a loaded model holds on a CPU, which does not report it, once its net has grown to a full batch."""
    arch, table, net = model.card.architecture, model.table.numel() * model.table.element_size(), model.net
    dtype = net.dtype if isinstance(net, CpuNet) else model.table.dtype
    if not isinstance(net, CpuNet) or net.note is not None:  # torch has one copy of the weights, for any batch
        return table + batch_bytes(slots) + size_bytes(1, arch, model.parameters, dtype)
    return table + batch_bytes(slots) + cpu_bytes(arch, model.parameters, slots.capacity, dtype)


def cpu_bytes(arch: AnyArchitecture, parameters: int, slots: int, dtype: torch.dtype) -> int:
    """What a net takes on a CPU at all its batch sizes: OpenVINO keeps the float32 weights it was given, and each batch
    size has weights and working memory of its own."""
    sizes = sizes_up_to(slots, arch, parameters, dtype)
    return 4 * parameters + sum(COMPILED_BYTES + size_bytes(size, arch, parameters, dtype) for size in sizes)


def batch_bytes(slots: Slots) -> int:
    """What the slots take, twice: for saved states, and for the plans' rows on a GPU."""
    return 2 * sum(
        tensor.numel() * tensor.element_size() for tensor in vars(slots).values() if isinstance(tensor, Tensor)
    )


def picture_bytes(arch: AnyArchitecture, dtype: torch.dtype, sampler: int) -> int:
    """What a step takes at most on a GPU while it runs, for each picture in it. sampler: as `SAMPLER`"""
    pixels, itemsize = arch.height * arch.width, int(dtype.itemsize)
    return math.ceil(WORKSPACE * (itemsize * alive(arch) + sampler * 4 * arch.in_channels * pixels))
