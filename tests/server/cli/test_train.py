"""`ddpm train`: one command makes a model directory of a folder of pictures, and says in one line what it cannot do."""

import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from model.checkpoint.card import read_card
from model.train import state
from model.train.report import Lines, Standing
from server.cli import main, train
from tests.model.convert.directories import write_model

QUICK = ["--images", "16", "--batch", "8", "--ema", "0.9", "--device", "cpu", "--dtype", "float32"]
CONFIGURATIONS = ("config.json", "scheduler_config.json", "model_index.json")


@pytest.fixture(autouse=True)
def small_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.train.sheet.ROWS", 1)
    monkeypatch.setattr("model.train.sheet.STEPS", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures in two folders."""
    for number in range(40):
        kind = tmp_path / "pictures" / ("cats", "dogs")[number % 2]
        kind.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(kind / f"{number}.png")
    return tmp_path / "pictures"


def test_a_folder_alone_becomes_a_model_that_is_served_with_its_labels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main.main(["train", str(folder), "--out", str(out), *QUICK]) == 0

    first, *_, last = capsys.readouterr().out.splitlines()
    card = read_card(out)
    assert first.startswith("training mine: 40 pictures with 2 labels (cats, dogs), 8 x 8 in colour; ")
    assert last == "done after 16 pictures"
    assert (card.shape, card.process.default_steps, card.left) == ((3, 8, 8), 50, ())
    assert card.labels is not None and card.labels.names == {0: "cats", 1: "dogs"} and card.labels.null == 2
    monkeypatch.setenv("DDPM_WEIGHTS", str(tmp_path / "mine"))
    assert main.main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("mine ")


def test_the_same_command_goes_on_and_leaves_the_configurations_as_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "mine", ["--size", "8", "--width", "8", *QUICK, "--images", "24"]
    command = ["train", str(folder), "--out", str(out), *flags]

    def stopping(_: Lines, standing: Standing) -> None:
        if standing.seen == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Lines, "update", stopping):
        assert main.main(command) == 128 + signal.SIGTERM
    (out / "model_index.json").write_text(json.dumps({"default_steps": 7}))
    assert "stopped after 16 pictures, at a checkpoint: the same command goes on" in capsys.readouterr().out

    assert main.main(command) == 0
    assert "goes on after 16 pictures" in capsys.readouterr().out
    assert json.loads((out / "model_index.json").read_text()) == {"default_steps": 7}


def test_a_directory_that_was_refused_is_made_anew_for_pictures_that_are_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "mine"
    for number in range(10):
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "deep" / "colour.png")
    (folder / "deep" / "colour.png").write_bytes((folder / "deep" / "colour.png").read_bytes()[:100])
    command = ["train", str(folder), "--out", str(out), *QUICK]
    assert main.main(command) == 2
    assert "deep/colour.png is not a sound picture" in capsys.readouterr().err
    assert not out.exists()

    (folder / "deep" / "colour.png").unlink()
    assert main.main(command) == 0
    assert read_card(out).shape[0] == 1


def test_a_picture_beside_sub_folders_is_why_there_are_no_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "stray.png")
    assert main.main(["train", str(folder), "--out", str(tmp_path / "mine"), *QUICK]) == 0

    assert "41 pictures without labels (stray.png lies in no sub-folder), 8 x 8" in capsys.readouterr().out


def test_a_directory_among_the_pictures_is_refused_before_it_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["train", str(folder), "--out", str(folder / "mine"), *QUICK]) == 2
    assert "would be trained on its samples" in capsys.readouterr().err
    assert not (folder / "mine").exists()


def test_configurations_may_be_those_of_another_model(weights: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "pictures.npz", images=np.zeros((40, 8, 8), np.uint8))
    source, out = str(tmp_path / "pictures.npz"), tmp_path / "new"
    assert main.main(["train", source, "--out", str(out), "--config", str(weights / "tiny"), *QUICK]) == 0

    for name in CONFIGURATIONS[:2]:
        assert (out / name).read_bytes() == (weights / "tiny" / name).read_bytes()
    assert read_card(out).labels is None


def test_a_net_of_another_model_that_knows_labels_is_told_their_names(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", {"num_class_embeds": 3, "in_channels": 3, "out_channels": 3})
    flags = ["--out", str(tmp_path / "new"), "--config", str(tmp_path / "other"), *QUICK]
    assert main.main(["train", str(folder), *flags]) == 0

    index = json.loads((tmp_path / "new" / "model_index.json").read_text())
    assert index == {"id2label": {"0": "cats", "1": "dogs"}, "null_label": 2, "guidance": 2.0}
    assert read_card(tmp_path / "new").labels is not None


@pytest.mark.parametrize(
    ("arrays", "flags", "named"),
    [
        ({"x": (40, 8, 8)}, [], "pictures.npz must be"),
        ({"images": (40,)}, [], "pictures.npz holds"),
        ({"images": (1, 8, 8)}, [], "pictures.npz must hold"),
        ({"images": (40, 8, 8)}, ["--batch", "0"], "batch must be"),
        ({"images": (40, 8, 8)}, ["--images", "0"], "images must be"),
        ({"images": (40, 8, 8)}, ["--rate", "nan"], "rate must be"),
        ({"images": (40, 8, 8)}, ["--minutes", "0"], "minutes must be"),
        ({"images": (40, 8, 8)}, ["--size", "30"], "--size must be a multiple of 4 in 8..512, got 30"),
        ({"images": (40, 8, 8)}, ["--width", "9"], "--width must be a multiple of 8"),
    ],
)
@pytest.mark.parametrize("configured", [True, False])
def test_an_error_in_training_is_one_line(
    arrays: dict[str, tuple[int, ...]],
    flags: list[str],
    named: str,
    configured: bool,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = tmp_path / "pictures.npz", str(tmp_path / "new")
    made: dict[str, Any] = {name: np.zeros(shape, np.uint8) for name, shape in arrays.items()}
    np.savez(source, **made)
    words = ["train", str(source), "--out", out, *(["--config", str(weights / "tiny")] if configured else [])]
    if configured and flags[:1] in (["--size"], ["--width"]):
        named = f"{flags[0]} {flags[1]}: {out}/config.json has 8, and a net keeps its shape"

    assert main.main([*words, "--device", "cpu", *flags]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"ddpm: {named}") and line.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--device", "abacus"], 6, "--device must be cpu, or a GPU that PyTorch finds here, got 'abacus'"),
        (["--device", "meta"], 6, "--device must be cpu"),
        (["--out", "FILE"], 2, "cannot be written: File exists"),
        (["--out", "DAMAGED"], 3, "training.safetensors is damaged, of another net, or has other moving averages"),
        (["--out", "FULL"], 7, "cannot be written: training.safetensors could not be written"),
        (["--config", "NONE"], 2, "--config must be a folder with config.json and scheduler_config.json"),
    ],
)
def test_a_training_that_cannot_begin_or_be_kept_says_so_in_one_line(
    flags: list[str],
    code: int,
    said: str,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save_file(*given: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    (tmp_path / "DAMAGED").mkdir()
    (tmp_path / "DAMAGED" / "training.safetensors").write_bytes(b"not quite")
    if "FULL" in flags:
        monkeypatch.setattr(state, "save_file", save_file)
    np.savez("pictures.npz", images=np.zeros((40, 8, 8), np.uint8))
    words = ["train", "pictures.npz", "--out", "new", "--config", str(weights / "tiny"), *QUICK]

    assert main.main([*words, *flags]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpm: ") and said in line


def test_pictures_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == f"ddpm: {tmp_path}/none is not there\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.long
@pytest.mark.parametrize("labelled", [False, True])
def test_a_picture_can_be_made_from_the_first_checkpoint_on(
    labelled: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder if labelled else folder / "cats"
    assert main.main(["train", str(source), "--out", str(tmp_path / "models" / "mine"), *QUICK]) == 0
    monkeypatch.setenv("DDPM_WEIGHTS", str(tmp_path / "models"))
    monkeypatch.setenv("DDPM_DEVICE", "cpu")
    asked = ["--label", "dogs"] if labelled else []
    assert main.main(["generate", "--seed", "1", "-o", str(tmp_path / "out.png"), *asked]) == 0

    with Image.open(tmp_path / "out.png") as made:
        assert (made.size, made.mode) == ((8, 8), "RGB")
        assert made.info.get("label") == ("1" if labelled else None)


class Terminal(io.StringIO):
    """A text file that passes for a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_how_far_it_is_below_the_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr("server.cli.progress.sys.stderr", terminal)
    seconds = iter(range(100))
    with train.Bar(lambda: next(seconds)) as bar:
        bar.reading(20, 40)
        bar.say("training mine")
        bar.update(Standing(seen=160, images=640, loss=0.5, images_per_s=40.0, left_s=12.0, done=0.25))

    drawn = re.sub(r"\|.*?\|", "|", terminal.getvalue()).split("\r")
    assert " 50%| 20 of 40 pictures read" in drawn
    assert " 25%| 160 of 640 pictures, loss 0.5000, 40.0 pictures/s, 12 s left" in [each.rstrip() for each in drawn]
    assert capsys.readouterr().out == "training mine\n"
