"""ddpm generate: the same bytes with and without a server, repeated pictures, progress and errors."""

import io
import sys
from pathlib import Path

import pytest
from ddpm_client import Client
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from server.cli import main
from server.cli.fields import FIELDS
from server.jobs.schemas import GenerateRequest
from tests.model.convert.directories import write_model
from tests.server.cli.conftest import ddpm
from tests.server.conftest import Server
from tests.server.fakes import read_texts

ASKED = ["--seed", "42", "--steps", "9", "--sampler", "ddim", "--eta", "0.5", "--no-clip"]


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


def test_the_limits_of_a_public_server_are_not_those_of_a_private_one(weights: Path, tmp_path: Path) -> None:
    knobs = {"DDPM_WEIGHTS": str(weights), "DDPM_THREADS": "1", "DDPM_SLOTS": "4", "DDPM_MAX_CONNECTIONS": "1"}
    asked = ["--n", "64", "--steps", "30", "--timeout", "5"]  # a stream, and the requests beside it
    made = ddpm("generate", *asked, "-o", str(tmp_path / "out.png"), **knobs)

    assert (made.returncode, len(made.stderr.splitlines())) == (0, 64)


@pytest.mark.parametrize(
    "asked",
    [
        "--steps 11 --variance large --spacing trailing --noise torch",
        "--sampler unipc --order 3 --timesteps 30,19,7,1 --no-clip",
        "--plan fast --noise torch",
        "--preset balanced",
        "",
    ],
)
def test_a_picture_can_be_repeated_from_its_png(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    assert main.main(["generate", "--seed", "7", *asked.split(), "-o", str(first), "--url", url]) == 0
    assert main.main(["generate", "--like", str(first), "-o", str(second), "--url", url]) == 0

    assert second.read_bytes() == first.read_bytes()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_repeating_a_picture_of_other_weights_or_another_machine_warns(
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


@pytest.mark.parametrize(("spacing", "warns"), [("linspace", True), ("trailing", False)])
def test_repeating_a_picture_of_dpmpp_2m_warns_if_its_version_had_other_levels(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], spacing: str, warns: bool
) -> None:
    with Client(url) as client:
        texts = client.generate(seed=7, steps=3, sampler="dpmpp_2m", spacing=spacing)[0].texts
    info, path = PngInfo(), tmp_path / "old.png"
    for key, text in texts.items():
        if key != "order":  # as that version wrote them
            info.add_text(key, text)
    Image.new("L", (8, 8)).save(path, pnginfo=info)

    assert main.main(["generate", "--like", str(path), "-o", str(tmp_path / "new.png"), "--url", url]) == 0
    said = "this is another picture: the version that made it had other levels for dpmpp_2m"
    assert (said in capsys.readouterr().err) == warns


def test_flags_override_the_request_of_a_repeated_picture(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        (tmp_path / "one.png").write_bytes(client.generate(seed=7, steps=5).png)
        expected = client.generate(seed=8, steps=5, n=2)
    asked = ["--like", str(tmp_path / "one.png"), "--seed", "8", "--n", "2", "-o", str(tmp_path / "more.png")]

    assert main.main(["generate", *asked, "--url", url]) == 0
    assert [(tmp_path / f"more-{seed}.png").read_bytes() for seed in (8, 9)] == [made.png for made in expected]
    assert main.main(["generate", *asked, "--sampler", "ddim", "--url", url]) == 0  # which has no variance


def test_without_a_word_about_sampling_the_preset_is_fast(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        fast, full = client.generate(seed=7, preset="fast").png, client.generate(seed=7, clip=True).png
    out = tmp_path / "out.png"

    for flags, expected in (([], fast), (["--preset", "full"], full), (["--clip"], full)):
        assert main.main(["generate", "--seed", "7", *flags, "-o", str(out), "--url", url]) == 0
        assert out.read_bytes() == expected


@pytest.mark.parametrize(
    ("before", "flags", "now"),
    [
        ("--plan fast", "--steps 5", {"steps": "5", "spacing": "leading", "plan": None, "timesteps": None}),
        ("--plan fast", "--order 1 --sampler unipc", {"sampler": "unipc", "steps": "3", "plan": None, "eta": None}),
        ("--plan fast", "--preset fast", {"sampler": "unipc", "steps": "10", "plan": None, "timesteps": None}),
        ("--sampler unipc --order 3 --timesteps 9,4", "--sampler ddim", {"order": None, "timesteps": "[9, 4]"}),
        ("--sampler unipc --timesteps 9,4", "--spacing trailing", {"steps": "2", "timesteps": None, "order": "2"}),
        ("--steps 7 --spacing trailing", "--timesteps 8,3", {"steps": "2", "spacing": None, "timesteps": "[8, 3]"}),
        ("--steps 7 --variance large", "--plan fast", {"plan": "fast", "variance": None}),
    ],
)
def test_flags_replace_what_cannot_stand_beside_them(
    url: str, tmp_path: Path, before: str, flags: str, now: dict[str, str | None]
) -> None:
    out = str(tmp_path / "out.png")
    assert main.main(["generate", "--seed", "7", *before.split(), "-o", out, "--url", url]) == 0
    assert main.main(["generate", "--like", out, *flags.split(), "-o", out, "--url", url]) == 0
    texts = read_texts(Path(out).read_bytes())

    assert {name: texts.get(name) for name in now} == now


def test_an_animation_of_several_pictures_has_one_frame_per_step_shown(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, frames = tmp_path / "out.png", tmp_path / "out.gif"
    asked = ["--seed", "3", "--n", "2", "--steps", "9", "--frames-count", "6", "--frames", str(frames)]

    assert main.main(["generate", *asked, "-o", str(out), "--url", url]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"{frames}: 6 frames"
    with Image.open(frames) as animation:
        assert getattr(animation, "n_frames", 1) == 6


def test_a_random_seed_is_printed(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["generate", "--steps", "2", "-o", str(tmp_path / "any.png"), "--url", url]) == 0

    assert f"seed {read_texts((tmp_path / 'any.png').read_bytes())['seed']}," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--steps", "31"], 2, "steps must lie in 1..30, got 31"),
        (["--order", "2"], 2, "order applies to dpmpp, "),
        (["--timesteps", "3,4"], 2, "timesteps must descend without repeats, got 4 behind 3"),
        (["--preset", "fast", "--steps", "3"], 2, "steps must be left out beside preset"),
        (["--plan", "slow"], 2, "plan must be one of fast"),
        (["--model", "other"], 2, "model must be one of tiny"),
        (["--like", "nothing.png"], 2, "nothing.png could not be read"),
        (["--like", __file__], 2, "is not a PNG"),
        (["--frames", "out.mp4"], 2, ".gif"),
        (["--frames-count", "3"], 2, "need --frames"),
        (["-o", "nowhere/out.png"], 2, "nowhere is not a folder"),
        (["-o", "-", "--n", "2"], 2, "one picture"),
        (["-o", "out.JPG"], 2, "pictures are written as PNG, not as .JPG"),
        (["-o", "/"], 2, "/ is a folder"),
        (["-o", "same.png", "--frames", "same.png"], 2, "two files"),
        (["--like", "/dev/zero"], 2, "is not a PNG"),
        (["--key-file", "/dev/zero"], 2, "a key consists of"),
        (["--key-file", "nothing"], 2, "--key-file could not be read"),
        (["--key-file", __file__], 2, "a key consists of"),
        (["--url", "http://[::1"], 2, "http://127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:9", "--timeout", "0.2"], 1, "cannot be reached"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    url: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert main.main(["generate", "--url", url, *words]) == code

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpm: ")
    assert said in line


def test_a_picture_of_another_program_cannot_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_a_private_server_fails_with_the_exit_code_of_ddpm_serve(
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


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_and_disappears(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main.main(["generate", "--n", "64", "--steps", "30", "-o", str(tmp_path / "out.png"), "--url", url]) == 0

    bar, told = terminal.getvalue().rstrip("\n").rsplit("\r", 1)
    assert told.startswith(f"{tmp_path}/out-")
    assert "/1920, about " in bar
    assert bar.rsplit("\r", 1)[1].strip() == ""


def test_progress_is_not_drawn_elsewhere(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["generate", "--steps", "30", "-o", str(tmp_path / "out.png"), "--url", url]) == 0

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'out.png'}: tiny, seed ")


def test_a_folder_that_is_called_a_number_is_asked_for_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"0": "1", "1": "2", "2": "salt, sea"}
    write_model(tmp_path / "weights" / "tiny", labels=4, index={"id2label": names, "null_label": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_WEIGHTS", str(tmp_path / "weights"))
        sheet = tmp_path / "a.png"
        asked = ["--labels", '["1", "sea", "2"]', "--n", "3", "--seed", "5", "--steps", "2", "-o", str(sheet)]
        assert main.main(["generate", *asked]) == 0
        assert [read_texts((tmp_path / f"a-{seed}.png").read_bytes())["label"] for seed in (5, 6, 7)] == ["0", "2", "1"]
        again = ["--like", str(tmp_path / "a-5.png"), "-o", str(tmp_path / "again.png")]
        assert main.main(["generate", *again]) == 0

    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a-5.png").read_bytes()
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("said", ["nan", "inf", "much"])
def test_a_number_that_json_lacks_is_a_usage_error(capsys: pytest.CaptureFixture[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["generate", "--label", "7", "--guidance", said])

    assert ended.value.code == 2
    assert f"--guidance: must be a number, got {said}" in capsys.readouterr().err


def test_levels_are_integers_with_commas(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["generate", "--timesteps", "5,x"])

    assert "argument --timesteps: must be integers with commas, such as 900,500,100" in capsys.readouterr().err
