"""The `ddpm` command: the same bytes with and without a server, pictures made again, and what it ends with."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddpm_client import Client
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from server import __version__
from server.cli import main
from server.cli.generate import FIELDS
from server.cli.progress import Bar
from server.jobs.schemas import GenerateRequest
from tests.server.conftest import Server
from tests.server.fakes import read_texts

ASKED = ["--seed", "42", "--steps", "9", "--sampler", "ddim", "--eta", "0.5", "--no-clip"]


@pytest.fixture
def url(server: Server) -> str:
    """Of the server that all tests share."""
    return f"http://127.0.0.1:{server.port}"


def ddpm(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")} | variables
    command = [sys.executable, "-m", "server", *map(str, words)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def test_command_and_server_say_which_version_they_are(server: Server) -> None:
    assert ddpm("--version").stdout == f"ddpm-server {__version__}\n"
    assert server.client.get("/openapi.json").json()["info"]["version"] == __version__
    assert f'ddpm_build_info{{version="{__version__}"}} 1.0' in server.client.get("/metrics").text


def test_every_field_of_a_request_has_a_flag() -> None:
    assert {*FIELDS, "clip", "frames"} == GenerateRequest.model_fields.keys()


def test_the_command_makes_the_same_bytes_with_and_without_a_server(
    weights: Path, server: Server, url: str, tmp_path: Path
) -> None:
    files = ["-o", str(tmp_path / "alone.png"), "--frames", str(tmp_path / "alone.gif")]
    knobs = {"DDPM_WEIGHTS": str(weights), "DDPM_THREADS": "1", "DDPM_SLOTS": "4"}
    alone = ddpm("generate", *ASKED, *files, **knobs)
    assert (alone.returncode, alone.stderr.splitlines()) == (
        0,
        [f"{tmp_path / 'alone.png'}: tiny, seed 42, 9 steps", f"{tmp_path / 'alone.gif'}: 10 frames"],
    )
    assert main.main(["generate", *ASKED, "-o", str(tmp_path / "asked.png"), "--url", url]) == 0

    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "asked.png").read_bytes()
    with Image.open(tmp_path / "alone.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 10


def test_a_picture_is_made_again_from_itself(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    asked = ["--seed", "7", "--steps", "11", "--variance", "large", "--spacing", "trailing", "--noise", "torch"]
    assert main.main(["generate", *asked, "-o", str(first), "--url", url]) == 0
    assert main.main(["generate", "--like", str(first), "-o", str(second), "--url", url]) == 0

    assert second.read_bytes() == first.read_bytes()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_picture_of_other_weights_on_another_machine_is_made_with_warnings(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "model": "tiny",
        "digest": "sha256:0",
        "seed": "7",
        "steps": "3",
        "sampler": "ddpm",
        "numerics": "an abacus",
    }
    info, path = PngInfo(), tmp_path / "old.png"
    for key, text in told.items():
        info.add_text(key, text)
    Image.new("L", (8, 8)).save(path, pnginfo=info)

    assert main.main(["generate", "--like", str(path), "-o", str(tmp_path / "new.png"), "--url", url]) == 0
    said = capsys.readouterr().err
    assert "another picture: model tiny has other weights" in said
    assert "it was made in an abacus" in said

    before = path.read_bytes()
    assert main.main(["generate", "--like", str(path), "-o", str(path), "--url", url]) == 2
    assert path.read_bytes() == before


def test_flags_change_what_a_picture_says(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        (tmp_path / "one.png").write_bytes(client.generate(seed=7, steps=5).png)
        expected = client.generate(seed=8, steps=5, n=2)
    asked = ["--like", str(tmp_path / "one.png"), "--seed", "8", "--n", "2", "-o", str(tmp_path / "more.png")]

    assert main.main(["generate", *asked, "--url", url]) == 0
    assert [(tmp_path / f"more-{seed}.png").read_bytes() for seed in (8, 9)] == [made.png for made in expected]
    assert main.main(["generate", *asked, "--sampler", "ddim", "--url", url]) == 0  # which has no variance


def test_an_animation_of_several_pictures_has_one_frame_for_each_point(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, frames = tmp_path / "out.png", tmp_path / "out.gif"
    asked = ["--seed", "3", "--n", "2", "--steps", "9", "--frames-count", "6", "--frames", str(frames)]

    assert main.main(["generate", *asked, "-o", str(out), "--url", url]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"{frames}: 6 frames"
    with Image.open(frames) as animation:
        assert getattr(animation, "n_frames", 1) == 6


def test_a_seed_that_was_drawn_is_told(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["generate", "--steps", "2", "-o", str(tmp_path / "any.png"), "--url", url]) == 0

    assert f"seed {read_texts((tmp_path / 'any.png').read_bytes())['seed']}," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--steps", "31"], 2, "steps must lie in 1..30, got 31"),
        (["--model", "other"], 2, "model must be one of tiny"),
        (["--like", "nothing.png"], 2, "nothing.png could not be read"),
        (["--like", __file__], 2, "is not a PNG"),
        (["--frames", "out.mp4"], 2, ".gif"),
        (["--frames-count", "3"], 2, "need --frames"),
        (["-o", "nowhere/out.png"], 2, "nowhere is not a folder"),
        (["-o", "-", "--n", "2"], 2, "one picture"),
        (["--key-file", "nothing"], 2, "--key-file could not be read"),
        (["--key-file", __file__], 2, "a key consists of"),
        (["--url", "http://[::1"], 2, "http://127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:9", "--timeout", "0.2"], 1, "cannot be reached"),
    ],
)
def test_what_cannot_be_ends_with_one_line(
    url: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert main.main(["generate", "--url", url, *words]) == code

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpm: ")
    assert said in line


def test_a_picture_of_something_else_cannot_be_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")

    assert main.main(["generate", "--like", str(tmp_path / "black.png")]) == 2
    assert "does not say what made it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"DDPM_WEIGHTS": "nowhere"}, 3, "nowhere is not a directory"),
        ({"DDPM_SLOTS": "many"}, 2, "DDPM_SLOTS"),
    ],
)
def test_without_a_server_it_ends_as_a_server_would(
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    code: int,
    said: str,
) -> None:
    for name, value in ({"DDPM_WEIGHTS": str(weights)} | variables).items():
        monkeypatch.setenv(name, value)

    assert main.main(["generate", "--seed", "1", "--steps", "1"]) == code
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_models_are_listed_with_and_without_a_server(
    weights: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDPM_WEIGHTS", str(weights))
    assert main.main(["models"]) == main.main(["models", "--url", url]) == 0

    _, here, _, there = (line.split() for line in capsys.readouterr().out.splitlines())
    assert here[:5] == there[:5] == ["tiny", "1x8x8", "30", "30", "epsilon"]
    assert here[5:] == ["-", "-", "-", there[-1]]
    assert (there[5], there[-2]) == ("cpu", "yes")


def test_a_benchmark_goes_up_to_all_slots(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--url", url, "--steps", "3", "--times", "1"]) == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert all(float(rate) > 0 for _, _, rate in rows)


def test_a_model_is_trained_into_a_directory_that_can_be_served(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "pictures.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8))
    source, config = str(tmp_path / "pictures.npz"), str(weights / "tiny")
    knobs = ["--images", "16", "--batch", "8", "--device", "cpu", "--float32"]
    monkeypatch.setenv("DDPM_WEIGHTS", str(tmp_path / "new"))

    assert main.main(["train", source, "--out", str(tmp_path / "new"), "--config", config, *knobs]) == 0
    assert json.JSONDecoder().raw_decode(capsys.readouterr().out.splitlines()[-1])[0]["images"] == 16
    assert main.main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("new ")
    assert main.main(["train", source, "--out", str(tmp_path / "newer"), *knobs]) == 2
    assert "--config must name one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "flags", "named"),
    [
        ({"x": (40, 8, 8)}, [], "pictures.npz"),
        ({"images": (40,)}, [], "pictures.npz"),
        ({"images": (1, 8, 8)}, [], "pictures.npz"),
        ({"images": (40, 8, 8)}, ["--batch", "0"], "batch"),
        ({"images": (40, 8, 8)}, ["--images", "0"], "images"),
        ({"images": (40, 8, 8)}, ["--rate", "nan"], "rate"),
    ],
)
def test_a_mistake_in_training_is_told_in_a_line(
    arrays: dict[str, tuple[int, ...]],
    flags: list[str],
    named: str,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = tmp_path / "pictures.npz", str(tmp_path / "new")
    made: dict[str, Any] = {name: np.zeros(shape, np.uint8) for name, shape in arrays.items()}
    np.savez(source, **made)
    words = ["train", str(source), "--out", out, "--config", str(weights / "tiny"), "--device", "cpu", *flags]

    assert main.main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"ddpm: {named} ") and line.count("\n") == 1


def test_help_names_every_command_and_enters_none() -> None:
    began = time.perf_counter()
    helped = ddpm("--help")
    took_s = time.perf_counter() - began

    assert [name for name in main.COMMANDS if f"    {name} " not in helped.stdout] == []
    assert took_s < 3  # 0.1 s on a machine with nothing else to do
    code = "import sys, server.cli.main; print(*{'pydantic', 'fastapi', 'httpx', 'numpy', 'PIL'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("command", [name for name in main.COMMANDS if name != "train"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "convert":
        pytest.importorskip("model.convert.__main__")
    with pytest.raises(SystemExit) as ended:
        main.main([command, "--help"])

    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_the_help_of_serve_says_what_every_setting_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["serve", "--help"])

    said = " ".join(capsys.readouterr().out.split())
    for setting in (
        "port to listen on; 0: any free port (default: 8000; 0 … 65535)",
        "(default: auto; auto, float32, bfloat16, float16)",
        "lowest level that is logged (default: info; debug, info, warning, error)",
        "(default: True; yes or no)",
    ):
        assert setting in said


def test_an_unknown_command_or_flag_is_a_matter_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["dance"], ["generate", "--sed", "1"]):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        assert ended.value.code == 2
        assert "usage: ddpm" in capsys.readouterr().err


def test_a_bar_is_drawn_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        with Bar(out) as bar:
            bar.draw(15, 30, "about 1 s")

    assert terminal.getvalue() == f"\r\x1b[2K[{'█' * 15}{' ' * 15}] 15/30 about 1 s\r\x1b[2K"
    assert file.getvalue() == ""
