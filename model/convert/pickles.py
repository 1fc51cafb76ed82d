"""Reads pickled checkpoints in a process of its own with limited resources, and writes them as safetensors.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses everything else. It still interprets an
untrusted program, so it never runs in the process that converts, nor in the server. Its result is a safetensors file,
which is read like any other.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.weighing import standing
from model.convert.nets import OUTER
from model.errors import ModelRefused, reason

MAX_FILE_BYTES = 64 << 30
MAX_SECONDS = 1800  # of processor time
SPARE_BYTES = 2 << 30  # of memory that reading may take besides twice the file
MAX_DEPTH = 4  # of containers around the tensors
MAX_PARTS = 64
EXIT_REFUSED = 3


def unpickle(source: Path, target: Path, part: str | None = None) -> tuple[str, list[str]]:
    """Writes one part of a pickled checkpoint as safetensors. Returns (its name, the names of all parts).

    Raises ModelRefused, in one line, if the file is malformed or reading it takes too much memory or time.
    """
    size = source.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelRefused(f"{source.name} has {size} bytes, at most {MAX_FILE_BYTES} are read")
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = [str(source), str(target), *([part] if part else [])]
    command = [sys.executable, "-P", "-W", "ignore", "-m", "model.convert.pickles", *arguments]
    environ = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == EXIT_REFUSED:
        raise ModelRefused(ascii(done.stderr[:500])[1:-1])
    if done.returncode:
        raise ModelRefused(f"{source.name} could not be read: reading it took too much, or failed")
    result = json.loads(done.stdout)
    return str(result["part"]), list(map(str, result["parts"]))


def parts(loaded: object) -> dict[str, dict[str, Tensor]]:
    """All state dicts in a checkpoint, by their paths, such as `ema`, `state_dict` or `0`; the outermost is ``."""
    found: dict[str, dict[str, Tensor]] = {}
    # lists, such as shadow parameters, come last, since they take their names from the dicts
    for path, value in sorted(_containers(loaded, ()), key=lambda place: isinstance(place[1], list | tuple)):
        name = ".".join(path)
        if isinstance(value, Mapping):
            tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
        else:
            tensors = _named_by_a_sibling(value, found)
        if tensors and len(found) < MAX_PARTS:
            found[name] = tensors
    return found


def _containers(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, container) of each dict and list in a checkpoint, the outer before the inner, without optimizers."""
    if isinstance(value, Mapping):
        if {"state", "param_groups"} <= value.keys():
            return
        yield path, value
        inner = [(str(key), item) for key, item in value.items() if not isinstance(item, Tensor)]
    elif isinstance(value, list | tuple):
        yield path, value
        inner = [(str(i), item) for i, item in enumerate(value) if not isinstance(item, Tensor)]
    else:
        return
    if len(path) < MAX_DEPTH:
        for key, item in inner:
            yield from _containers(item, (*path, key))


def _named_by_a_sibling(values: Sequence[object], named: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Shadow parameters, a list in the order of the net's own, by the names of a state dict with the same shapes."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    shapes = [tensor.shape for tensor in tensors]
    for sibling in named.values():
        if len(tensors) == len(values) > 1 and [tensor.shape for tensor in sibling.values()] == shapes:
            return dict(zip(sibling, tensors, strict=True))
    return {}


def _unnamed(loaded: object) -> dict[str, dict[str, Tensor]]:
    """The longest list of tensors in a checkpoint, by their numbers: an average that has no names of its own."""
    lists = {".".join(path): value for path, value in _containers(loaded, ()) if isinstance(value, list | tuple)}
    found = {
        path: {str(i): tensor for i, tensor in enumerate(values)}
        for path, values in lists.items()
        if values and all(isinstance(value, Tensor) for value in values)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1]))[:1])


def choose(found: Mapping[str, Mapping[str, Tensor]], part: str | None) -> str:
    """The part to take: the given one, else an average over training, else the largest. Raises ModelRefused.

    Of a given part that lies inside a state dict, such as `state_dict.ema_model`, this is the state dict.
    """
    if part is not None:
        holding = [name for name in found if name == part or not name or part.startswith(f"{name}.")]
        if not holding:
            raise ModelRefused(f"--part must be one of {', '.join(map(repr, found))}")
        return max(holding, key=len)
    most = max(map(len, found.values()))
    whole = {name: tensors for name, tensors in found.items() if 2 * len(tensors) > most}  # the others hold counters
    averages = [name for name in whole if standing(name) == min(map(standing, whole))]
    listed = [name for name in found if name.isdigit()]
    if min(map(standing, whole)) and listed and len(found[listed[0]]) == len(found[listed[-1]]):
        averages = listed[-1:]  # a list [net, optimizer, …, average]
    return max(averages, key=lambda name: len(found[name]))


def _tables(found: Mapping[str, Mapping[str, Tensor]], taken: str) -> dict[str, Tensor]:
    """The vectors of a checkpoint's parts that hold nothing else: of its diffusion process, if they are tables."""
    others = [tensors for name, tensors in found.items() if name != taken]
    plain = [tensors for tensors in others if all(each.ndim < 2 for each in tensors.values())]
    return {
        key: tensor
        for tensors in plain
        for key, tensor in tensors.items()
        if tensor.layout == torch.strided and not tensor.is_quantized and tensor.ndim == 1
    }


def _number_makers() -> list[Any]:
    """What pickles of NumPy's numbers call, such as that of a loss, under its names in NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(letter)) for letter in "?bBhHiIlLqQefd"]
    return [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")] + [np.dtype, *kinds]


def _load(source: Path) -> object:
    try:
        with torch.serialization.safe_globals(_number_makers()):
            return torch.load(source, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if (unwanted := re.search(r"GLOBAL ([\w.]+)", str(error))) is None:
            raise ModelRefused(f"{source.name} is a pickle that torch.save has not written, or is damaged") from error
        raise ModelRefused(
            f"{source.name} holds {unwanted[1]}, which is not a tensor, and is not read; if you trust the file, save "
            "its state dict alone"
        ) from error
    except (MemoryError, OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, RecursionError) as error:
        raise ModelRefused(f"{source.name} is not a sound checkpoint of torch: {reason(error)}") from error


def _bounded(size: int) -> None:
    """Limits this process's memory, time and disk space. size: of the file that it will read"""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + 2 * size + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + SPARE_BYTES, size + SPARE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def extract(source: Path, target: Path, part: str | None = None) -> tuple[str, list[str]]:
    """Does the work of `unpickle` in this process, without limits."""
    loaded = _load(source)
    found = parts(loaded) or _unnamed(loaded)
    if not found:
        raise ModelRefused(f"{source.name} holds no tensors by name")
    name = choose(found, part)
    if any(tensor.layout != torch.strided or tensor.is_quantized for tensor in found[name].values()):
        raise ModelRefused(f"{source.name} holds sparse or quantised tensors")
    state = found[name] | {f"{OUTER}{key}": tensor for key, tensor in _tables(found, name).items()}
    # a copy of each tensor: safetensors knows no views of a common storage
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in state.items()}, target)
    return name, list(found)


def main(arguments: Sequence[str]) -> int:
    """The entrance of the process: SOURCE TARGET [PART]. Returns the exit code."""
    source, target = map(Path, arguments[:2])
    _bounded(source.stat().st_size)
    try:
        name, found = extract(source, target, arguments[2] if len(arguments) > 2 else None)
    except ModelRefused as refused:
        print(refused, end="", file=sys.stderr)
        return EXIT_REFUSED
    print(json.dumps({"part": name, "parts": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
