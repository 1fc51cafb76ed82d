"""A file that is no checkpoint is refused in a line that says what it is, before torch is imported."""

import io
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint.beginnings import recognised
from model.checkpoint.header import read_header
from model.convert.files import SAFETENSORS, TORCH, kind
from model.errors import ModelRefused
from tests.model.convert.test_convert import refused, written

ROOT = Path(__file__).parents[3]


def picture(form: str) -> bytes:
    Image.new("RGB", (4, 4)).save(made := io.BytesIO(), form)
    return made.getvalue()


def archive(*names: str) -> bytes:
    with zipfile.ZipFile(made := io.BytesIO(), "w") as written:
        for name in names:
            written.writestr(name, "x")
    return made.getvalue()


def npy() -> bytes:
    np.save(made := io.BytesIO(), np.zeros(3))
    return made.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 455000\n"
FOREIGN: dict[str, tuple[bytes, str]] = {
    "picture.png": (picture("PNG"), "a PNG picture"),
    "net.bin": (picture("JPEG"), "a JPEG picture"),
    "net.gif": (picture("GIF"), "a GIF picture"),
    "net.webp": (picture("WEBP"), "a WebP picture"),
    "model.gguf": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
    "model.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.4.0" + bytes(64), "an ONNX model"),
    "diffusion_pytorch_model.safetensors": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
    "page.pt": (b"\n  <HTML>404</HTML>", "a web page"),
    "pointer.safetensors": (LFS, "a pointer of Git LFS, not the file itself"),
    "source.pt": (archive("repo/README.md", "repo/net.py"), "a zip archive that torch.save has not written"),
    "arrays.pt": (archive("a.npy", "b.npy"), "an archive of NumPy arrays"),
    "net.keras": (archive("config.json", "model.weights.h5"), "a model of Keras"),
    "traced.pt": (
        archive("net/data.pkl", "net/code/__torch__.py"),
        "a TorchScript program: save the net's",
    ),
    "cut.pt": (archive("net/data.pkl")[:-30], "a damaged or truncated zip archive"),
    "net.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
    "saved_model.pb": (b"\x08\x01\x12\xf4\x03\x0a\x10", "a SavedModel of TensorFlow"),
    "net.ckpt.index": (
        b"\0\0\1\2" + bytes(40) + bytes.fromhex("57fb808b247547db"),
        "a part of a TensorFlow checkpoint",
    ),
    "flax_model.msgpack": (
        b"\x81\xa6params\x82\xa7conv_in\xc0\xa8conv_out\xc0",
        "a msgpack file, as Flax saves weights",
    ),
    "net.npy": (npy(), "a NumPy array"),
    "net.tar.gz": (b"\x1f\x8b\x08\0" + bytes(20), "a gzip archive: unpack it first"),
    "net.tar": (b"net.pt".ljust(257, b"\0") + b"ustar\x0000" + bytes(700), "a tar archive: unpack it first"),
    "config.json": (json.dumps({"_class_name": "UNet2DModel"}).encode(), "a text file"),
    "empty.pt": (b"", "empty"),
    "zeros.safetensors": (bytes(4096), "nothing but zeros at its start: an unfinished download"),
    "noise.pt": (bytes(range(200, 256)) * 9, "of no known kind, or damaged"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_refused_with_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes(FOREIGN[name][0])

    assert refused(capsys, tmp_path / name).startswith(f"{name} is {FOREIGN[name][1]}")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_server_calls_it_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FOREIGN[name][0])
    with pytest.raises(ModelRefused) as refusal:
        read_header(tmp_path / name)

    known = recognised(FOREIGN[name][0])
    zipped = "a pickle, as torch.save writes" if FOREIGN[name][0].startswith(b"PK") else "its header claims"
    assert f"{name} is not a safetensors file: " in str(refusal.value)
    assert (FOREIGN[name][1] if known else zipped) in str(refusal.value)


@pytest.mark.parametrize("length", [8, 0x85A5, 0x0208, 0x2020])
def test_what_is_left_of_a_safetensors_file_is_nothing_else(length: int) -> None:
    assert recognised(struct.pack("<Q", length) + b'{"conv_in.weight":{') == ""


def only(*names: str, **configs: object) -> Callable[[Path], object]:
    """A directory of these files, each four bytes that are nothing, and of these configurations of a net."""

    def write(directory: Path) -> None:
        for name in [*names, *(f"{name}.json" for name in configs)]:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(json.dumps(configs.get(name.removesuffix(".json"), 1234)))

    return write


def torch_file(path: Path) -> Path:
    """A file of torch.save."""
    torch.save({}, path)
    return path


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
# What is refused before torch is imported: the arguments, what writes them, and what is said.
EARLY: dict[str, tuple[list[str], Callable[[Path], object], str]] = {
    "a picture": (["a.png"], lambda directory: (directory / "a.png").write_bytes(picture("PNG")), "is a PNG picture"),
    "nothing": (["."], only(), "holds no weights of a net: it is empty"),
    "no net": (["."], only("notes.txt"), "holds no weights of a net: 'notes.txt'"),
    "weights of no kind": (
        ["."],
        only("unet/model.safetensors", config={}),
        "model.safetensors is a text file; a checkpoint",
    ),
    "no configuration": (["unet"], only("unet/a.bin"), "a.bin has no config.json beside it"),
    "no such part": (
        ["unet", "--part", "x"],
        only("unet/a.bin", "unet/b.bin"),
        "--part must be one of 'a.bin', 'b.bin'",
    ),
    "a format of a directory": (["unet", "--format", "openai"], only("unet/a.bin"), "--format and --part must not be"),
    "a net that reads labels otherwise": (
        ["a.bin", "--config", "config.json"],
        lambda directory: [only(config={"class_embeddings_concat": True})(directory), torch_file(directory / "a.bin")],
        "class_embeddings_concat must be null, got true",
    ),
    "a configuration that is none": (
        ["a.bin", "--config", "config.json"],
        lambda directory: [only("config.json")(directory), torch_file(directory / "a.bin")],
        "config.json must be a JSON object",
    ),
    "a schedule that is none": (
        ["a.bin", "--scheduler", "a.bin"],
        lambda directory: torch_file(directory / "a.bin"),
        "a.bin is not valid JSON",
    ),
    "another process": (
        ["a.bin", "--scheduler", "flow.json"],
        lambda directory: [only(flow=FLOW)(directory), torch_file(directory / "a.bin")],
        "flow matching, EDM and score SDEs are other processes",
    ),
    "another process beside the net": (
        ["unet"],
        lambda directory: [
            only(**{"unet/config": {}, "scheduler_config": FLOW})(directory),
            torch_file(directory / "unet/a.bin"),
        ],
        "flow matching, EDM and score SDEs are other processes",
    ),
}


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process that imports no torch says of each, and as the last how much memory it took."""
    lines = []
    for arguments, write, _ in EARLY.values():
        write(directory := tmp_path_factory.mktemp("early"))
        lines.append(
            json.dumps([str(directory / word) if "." in word or word == "unet" else word for word in arguments])
        )
    code = (
        "import json, sys; from model.convert.__main__ import main\n"
        "for line in sys.stdin: print(main([*json.loads(line), '/tmp/nothing/is/made']), 'torch' in sys.modules)\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), cwd=ROOT, capture_output=True, text=True
    )
    *codes, most_kib = done.stdout.splitlines()
    assert codes == ["3 False"] * len(EARLY), done.stderr
    assert int(most_kib) < 64 << 10
    return dict(zip(EARLY, done.stderr.splitlines(), strict=True))


@pytest.mark.parametrize("kind", EARLY)
def test_what_can_be_told_without_torch_is_refused_without_it(kind: str, early: dict[str, str]) -> None:
    assert EARLY[kind][2] in early[kind]


def test_a_checkpoint_is_known_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2)}
    torch.save(state, tmp_path / "pickle.safetensors")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)

    assert kind(written(tmp_path / "net.ckpt", state)) == SAFETENSORS
    assert kind(tmp_path / "pickle.safetensors") == kind(tmp_path / "old.bin") == TORCH
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{")
    assert re.search("damaged", _said(tmp_path / "long.safetensors"))


def _said(path: Path) -> str:
    with pytest.raises(Exception) as caught:
        kind(path)
    return str(caught.value)
