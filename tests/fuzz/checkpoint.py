"""Fuzzing of the checkpoint reader, guided by coverage: whatever a model directory holds, it loads or it is refused.

`python -m tests.fuzz.checkpoint --runs 100000`. A mutant that reaches lines nobody reached before becomes a parent.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from model import options
from model.checkpoint import card, foreign, header, load, pipeline, scheduler, shapes
from model.checkpoint.card import WEIGHTS, read_card
from model.checkpoint.load import load_model
from model.errors import ModelRefused
from model.nets import config
from model.sampling import schedule
from tests.model.convert.directories import write_model
from tests.model.tiny import CPU

import torch  # isort: skip

Files: TypeAlias = dict[str, bytes]
MAX_SECONDS = 2.0  # for one directory
MODULES = (config, card, foreign, header, load, options, pipeline, schedule, scheduler, shapes)
READERS = {str(module.__file__) for module in MODULES}
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2,
    2**31,
    2**63,
    1e999,
    -1e999,
    float("nan"),
    0.5,
    1e-300,
    "",
    "x" * 300,
    [],
    {},
]
VALUES += [
    [1] * 9,
    [[]],
    ["DownBlock2D"] * 8,
    "../x",
    ["diffusers", "VQModel"],
    "DDIMScheduler",
    "HeunDiscreteScheduler",
    "UNet2DConditionModel",
    "\x00",
    "\ud800",
    "F32",
    "I8",
    [2**40, 2**40],
    [0, -1],
    [0, 2**62],
]
BYTES = [b"", b"\x00", b"\xff" * 8, b"{", b"}", b"[" * 2000, b'"', b"1e999", b"NaN", b"\xef\xbb\xbf", b"9" * 5000]


def seed_files(folder: Path) -> Files:
    """A sound model directory as bytes."""
    write_model(folder)
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _mutated_json(text: bytes, chance: random.Random) -> bytes:
    """The same object with one value somewhere in it replaced, one key dropped, or one added."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    place, depth = value, chance.randrange(4)
    while depth and isinstance(place, dict | list) and place:
        inner = chance.choice(list(place.values() if isinstance(place, dict) else place))
        if not isinstance(inner, dict | list) or not inner:
            break
        place, depth = inner, depth - 1
    if isinstance(place, dict) and place:
        key = chance.choice(list(place))
        if chance.random() < 0.15:
            del place[key]
        else:
            place[key if chance.random() < 0.9 else "more"] = chance.choice(VALUES)
    elif isinstance(place, list) and place:
        place[chance.randrange(len(place))] = chance.choice(VALUES)
    return json.dumps(value).encode()


def _mutated_bytes(data: bytes, chance: random.Random, end: int) -> bytes:
    """The same bytes with a few of the first `end` of them changed, cut out, or something put between."""
    at = chance.randrange(min(len(data), end) + 1)
    length = chance.choice([0, 1, 1, 2, 8, 100])
    return data[:at] + chance.choice([*BYTES, chance.randbytes(4), chance.randbytes(1)]) + data[at + length :]


def mutate(files: Files, chance: random.Random) -> Files:
    """A directory that differs in one file."""
    name = chance.choice(sorted(files))
    data = files[name]
    if name == WEIGHTS:
        size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
        if chance.random() < 0.6 and 0 < size < len(data):
            header = _mutated_json(data[8 : 8 + size], chance)
            data = len(header).to_bytes(8, "little") + header + data[8 + size :]
        else:
            data = _mutated_bytes(data, chance, 8 + size)
    else:
        data = _mutated_json(data, chance) if chance.random() < 0.7 else _mutated_bytes(data, chance, len(data))
    return files | {name: data}


def traced(attempt: Callable[[], None]) -> set[tuple[str, int]]:
    """Which lines of the readers an attempt goes over."""
    seen: set[tuple[str, int]] = set()

    def line(frame: FrameType, event: str, _: Any) -> Any:
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename in READERS else None

    sys.settrace(call)
    try:
        attempt()
    finally:
        sys.settrace(None)
    return seen


def attempt(folder: Path, files: Files) -> None:
    """Opens a directory of these files. Raises whatever is neither a model nor a refusal in one line."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    began = time.process_time()
    try:
        load_model(read_card(folder), CPU, torch.float32)
    except ModelRefused as error:
        assert "\n" not in str(error), "a refusal is one line"
        assert len(str(error)) < 1000, "a refusal is short"
    assert time.process_time() - began < MAX_SECONDS, "a refusal costs next to nothing"


def fuzz(runs: int, seed: int, folder: Path) -> tuple[int, int]:
    """So many mutants. -> how many lines were reached, and by how many parents"""
    chance, reached = random.Random(seed), set[tuple[str, int]]()
    parents = [seed_files(folder)]
    for _ in range(runs):
        child = mutate(chance.choice(parents), chance)
        for _ in range(chance.randrange(3)):
            child = mutate(child, chance)
        try:
            lines = traced(lambda child=child: attempt(folder, child))  # type: ignore[misc]
        except Exception:
            kept = Path(tempfile.mkdtemp(prefix="refused-badly-"))
            for name, data in child.items():
                (kept / name).write_bytes(data)
            print(f"this directory was not refused well: {kept}", file=sys.stderr)
            raise
        if not lines <= reached:
            reached |= lines
            parents.append(child)
    return len(reached), len(parents)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        lines, parents = fuzz(arguments.runs, arguments.seed, Path(folder))
    print(json.dumps({"runs": arguments.runs, "seed": arguments.seed, "lines": lines, "parents": parents}))


if __name__ == "__main__":
    main()
