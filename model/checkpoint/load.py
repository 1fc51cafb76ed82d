"""Loads a model directory: checks the weights file against the net before it takes memory for either.

Only safetensors is read. Its header must name exactly the tensors that the configuration calls for, in their shapes.
Other files in a directory are ignored.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint.card import ModelCard
from model.errors import ModelRefused
from model.nets.build import Net, build
from model.nets.config import MAX_PARAMETERS
from model.nets.cpu import CpuNet
from model.nets.exact import use_libraries
from model.options import unique_keys

MAX_HEADER_BYTES = 1 << 20
MAX_TABLE = 1 << 30  # numbers in the table of timestep embeddings
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names, and bytes
# The names of the net's parts before diffusers 0.1, and of attention's layers before 0.17.
OLD_PLACES = {"downsample_blocks": "down_blocks", "upsample_blocks": "up_blocks", "mid": "mid_block"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A net ready to run, and the table of its timestep embeddings."""

    card: ModelCard
    net: Net | CpuNet
    table: Tensor  # [T, P] row k is `net.embed` of the timestep that the net was trained with at t = k + 1
    parameters: int = 0  # the number of weights

    @property
    def module(self) -> Net:
        """The net as torch's layers, which it consists of unless `load_model` loaded it onto a CPU."""
        assert not isinstance(self.net, CpuNet)
        return self.net


def modern(key: str) -> str:
    """A tensor's name in today's diffusers, given its name in any version."""
    first, *rest = key.split(".")
    if "attentions" in rest[:-2] and rest[-2] in OLD_ATTENTION:
        rest[-2] = OLD_ATTENTION[rest[-2]]
    return ".".join([OLD_PLACES.get(first, first), *rest])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of a safetensors file, read from its header alone. Raises ModelRefused if it is malformed.

    The tensors must lie back to back and fill the file to its last byte.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ModelRefused(f"{path.name} is not a safetensors file: its header claims {length} of {size} bytes")
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
    except OSError as error:
        raise ModelRefused(f"{path.name} could not be read: {type(error).__name__}") from error
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{path.name} has a malformed header: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ModelRefused(f"{path.name} has a malformed header: not an object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ModelRefused(f"{path.name} has a malformed entry in its header")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in FLOATS:
            raise ModelRefused(f"{path.name} holds a tensor that is not one of {', '.join(FLOATS)}")
        sound = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not sound or len(shape) > 8 or not all(map(_is_count, [*shape, *offsets])):
            raise ModelRefused(f"{path.name} has a malformed shape or offset in its header")
        if offsets[1] - offsets[0] != math.prod(shape) * FLOATS[dtype]:
            raise ModelRefused(f"{path.name} has a tensor whose bytes do not match its shape")
        tensors[name] = (dtype, tuple(shape))
        spans.append(tuple(offsets))
    _check_spans(path, sorted(spans), size - 8 - length)
    return tensors


def _check_spans(path: Path, spans: Iterable[tuple[int, ...]], end: int) -> None:
    """Checks that the tensors cover the data exactly, without overlap or hole. Raises ModelRefused."""
    position = 0
    for start, stop in spans:
        if start != position:
            raise ModelRefused(f"{path.name} has tensors that overlap or leave holes")
        position = stop
    if position != end:
        raise ModelRefused(f"{path.name} is truncated or has data behind its tensors: {end} bytes, {position} expected")


def _read_headers(card: ModelCard) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[Path, str]]]:
    """({name: shape}, {name: (file, name there)}) of all tensors in the weights, by their names of today."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[Path, str]] = {}
    count = 0
    for path in card.weight_files:
        header = read_header(path)
        count += len(header)
        shapes |= {modern(key): shape for key, (_, shape) in header.items()}
        places |= {modern(key): (path, key) for key in header}
        if len(places) != count:
            raise ModelRefused(f"{path.name} holds weights twice, or under both their old and their new names")
    return shapes, places


def _find(card: ModelCard, net: Net) -> dict[str, tuple[Path, str]]:
    """The file of each of the net's tensors, and its name there. Raises ModelRefused at the first that is wrong."""
    shapes, places = _read_headers(card)
    expected = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    for name, shape in expected.items():
        if name not in places:
            raise ModelRefused(f"{card.weights.name} lacks {name}")
        if shapes[name] != shape:
            given = list(shapes[name])
            raise ModelRefused(f"{card.weights.name}: {name} must have shape {list(shape)}, got {given}")
    extra = len(places.keys() - expected.keys())
    if extra:
        raise ModelRefused(f"{card.weights.name} holds {extra} tensors that config.json does not call for")
    return places


def _own(tensor: Tensor) -> Tensor:
    """A copy in float32: safetensors maps the file, which may be overwritten later."""
    return tensor.to(torch.float32, copy=True)


def _read(places: dict[str, tuple[Path, str]]) -> dict[str, Tensor]:
    """The tensors at these places, in float32. Raises ModelRefused."""
    weights: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for path, _ in places.values()):
        try:
            with safe_open(path, "pt") as file:
                weights |= {name: _own(file.get_tensor(key)) for name, (at, key) in places.items() if at == path}
        except (SafetensorError, OSError) as error:
            raise ModelRefused(f"{path.name} could not be read: {type(error).__name__}") from error
    return weights


def _load(card: ModelCard, device: torch.device) -> tuple[Net, Tensor, int]:
    """(the net in float32 on its device, its table, its number of weights). Raises ModelRefused."""
    with torch.device("meta"):
        net = build(card.architecture)
    count = sum(p.numel() for p in net.parameters())
    if count > MAX_PARAMETERS:
        raise ModelRefused(f"config.json: at most {MAX_PARAMETERS} parameters are allowed, it calls for {count}")
    numbers = net.embedding_width * card.process.schedule.T
    if numbers > MAX_TABLE:
        raise ModelRefused(f"config.json: at most {MAX_TABLE} timestep embeddings are allowed, it calls for {numbers}")
    weights = _read(_find(card, net))
    for name, tensor in weights.items():
        if not all(end.isfinite() for end in tensor.aminmax()):  # a NaN is both the least and the greatest
            raise ModelRefused(f"{card.weights.name}: {name} holds numbers that are not finite")
    net.load_state_dict(weights, assign=True)
    net = net.eval().requires_grad_(False).to(device)
    with torch.inference_mode():
        table = net.embed(torch.arange(card.process.schedule.T, device=device))  # [T, P]
        net.fuse()
        use_libraries(net)
    return net, table, count


def load_layers(card: ModelCard, device: torch.device, dtype: torch.dtype) -> Model:
    """The net as torch's layers and its table, both in `dtype`, as a GPU runs them. Raises ModelRefused."""
    net, table, count = _load(card, device)
    with torch.inference_mode():
        net = net.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(card, net, table.to(dtype), count)


def load_model(card: ModelCard, device: torch.device, dtype: torch.dtype, unusable: str = "") -> Model:
    """The net on its device, and its table. Raises ModelRefused, in one line, before it takes memory for the weights.

    unusable: the reason not to try OpenVINO on a CPU, or nothing; see `CpuNet`
    """
    if device.type != "cpu":
        return load_layers(card, device, dtype)
    net, table, count = _load(card, device)
    with torch.inference_mode():
        return Model(card, CpuNet(net, table, dtype, count, unusable), table, count)
