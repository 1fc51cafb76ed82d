"""Loads a model directory: reads each weights file once, from its first byte to its last, into memory of its own.

The digest is that of the bytes that were read: what was checked is what is used, whatever becomes of the files.
"""

import hashlib
import re
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.card import ModelCard
from model.checkpoint.header import Entry, modern, parse
from model.checkpoint.shapes import Shapes, count, shapes
from model.digests import combined_digest
from model.errors import ModelRefused, reason
from model.nets.build import Net, build
from model.nets.cpu import CpuNet
from model.nets.exact import use_libraries

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A net ready to run, and the table of its timestep embeddings."""

    card: ModelCard
    net: Net | CpuNet
    # [T + L, W] row k is `net.embed` of the timestep that the net was trained with at t = k + 1; behind these, of a
    # conditional net, L rows of `net.embed_labels`.
    table: Tensor
    parameters: int = 0  # the number of weights
    digest: str = ""  # of what was loaded, as `ModelCard.digest`

    @property
    def module(self) -> Net:
        """The net as torch's layers, which it consists of unless `load_model` loaded it onto a CPU."""
        assert not isinstance(self.net, CpuNet)
        return self.net


def read_tensors(path: Path, expected: Shapes) -> tuple[dict[str, Tensor], str]:
    """({today's name: tensor in float32}, sha256 of the file). Raises ModelRefused.

    expected: names and shapes that a tensor may have; nothing is read of a file that has another
    """
    tensors: dict[str, Tensor] = {}
    try:
        with path.open("rb") as file:
            entries, head = parse(file, path.name)
            if any(expected.get(modern(entry.key)) != entry.shape for entry in entries):
                raise ModelRefused(f"{path.name} does not hold the weights of this net")
            hasher = hashlib.sha256(head)
            for entry in entries:
                tensors[modern(entry.key)] = _read(file, path.name, entry, hasher)
            if file.read(1):
                raise ModelRefused(f"{path.name} became longer while it was read")
    except OSError as error:
        raise ModelRefused(f"{path.name} could not be read: {reason(error)}") from error
    _require_blob(path.resolve(), hasher.hexdigest())
    return tensors, hasher.hexdigest()


def _read(file: BufferedReader, name: str, entry: Entry, hasher: "hashlib._Hash") -> Tensor:
    """The tensor at which a file stands, in float32 and in memory of its own. Raises ModelRefused, OSError."""
    stored = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    place = stored.reshape(-1).view(torch.uint8).numpy().data
    if file.readinto(place) != len(place):
        raise ModelRefused(f"{name} became shorter while it was read")
    hasher.update(place)
    tensor = stored.float()
    if not all(end.isfinite() for end in tensor.aminmax()):  # a NaN is both the least and the greatest
        raise ModelRefused(f"{name}: {modern(entry.key)} holds numbers that are not finite")
    return tensor


def _require_blob(path: Path, digest: str) -> None:
    """Raises ModelRefused if a file of a hub's cache, which is named after its sha256, holds something else."""
    if path.parent.name == "blobs" and BLOB.fullmatch(path.name) and path.name != digest:
        raise ModelRefused(f"the hub's cache is damaged: a file of weights has sha256 {digest}, not {path.name}")


def _load(card: ModelCard, device: torch.device) -> tuple[Net, Tensor, int, str]:
    """(the net in float32 on its device, its table, its number of weights, its digest). Raises ModelRefused."""
    weights, digests, expected = dict[str, Tensor](), list[str](), shapes(card.architecture)
    for path in card.weight_files:
        tensors, digest = read_tensors(path, expected)
        if weights.keys() & tensors.keys():
            raise ModelRefused(f"{path.name} holds weights twice")
        weights |= tensors
        digests.append(digest)
    with torch.device("meta"):
        net = build(card.architecture)
    if weights.keys() != expected.keys():
        raise ModelRefused(f"{card.weights.name} does not hold all weights of this net")
    net.load_state_dict(weights, assign=True)
    net = net.eval().requires_grad_(False).to(device)
    with torch.inference_mode():
        table = net.embed(torch.arange(card.process.schedule.T, device=device))  # [T, W]
        if net.labels:
            table = torch.cat([table, net.embed_labels()])  # [T + L, W]
        net.fuse()
        use_libraries(net)
    return net, table, count(expected), combined_digest([*digests, *card.configs])


def load_layers(card: ModelCard, device: torch.device, dtype: torch.dtype) -> Model:
    """The net as torch's layers and its table, both in `dtype`, as a GPU runs them. Raises ModelRefused."""
    net, table, parameters, digest = _load(card, device)
    with torch.inference_mode():
        net = net.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(card, net, table.to(dtype), parameters, digest)


def load_model(card: ModelCard, device: torch.device, dtype: torch.dtype, unusable: str = "") -> Model:
    """The net on its device, and its table. Raises ModelRefused, in one line.

    unusable: the reason not to try OpenVINO on a CPU, or nothing; see `CpuNet`
    """
    if device.type != "cpu":
        return load_layers(card, device, dtype)
    net, table, parameters, digest = _load(card, device)
    with torch.inference_mode():
        return Model(card, CpuNet(net, table, dtype, parameters, unusable), table, parameters, digest)
