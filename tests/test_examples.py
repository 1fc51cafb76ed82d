"""The examples work as their docstrings say, and are short."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.model.convert.directories import write_model
from tests.server.conftest import Server

STEPS = [round(i * 30 / 29) for i in range(30)]
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny model that knows the labels 0 to 9."""
    folder = tmp_path_factory.mktemp("weights")
    with Server(write_model(folder / "tiny", labels=11, index={"null_label": 10, "guidance": 2.0})) as running:
        yield running


def run(example: str, *words: str | Path) -> str:
    """Runs an example and returns what it prints."""
    command = [sys.executable] if example.endswith(".py") else ["sh"]
    command += [str(EXAMPLES / example), *map(str, words)]
    root = EXAMPLES.parent
    environ_of = {"PYTHONPATH": f"{root}:{root / 'client'}", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(command, env=environ_of, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def seed_of(path: Path) -> str:
    """The seed in the text chunks of a PNG."""
    with Image.open(path) as picture:
        return str(picture.info["seed"])


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()))
def test_an_example_has_fewer_than_thirty_lines(example: str) -> None:
    assert len((EXAMPLES / example).read_text().splitlines()) < 30


def test_watching_saves_every_frame_and_the_picture(server: Server, tmp_path: Path) -> None:
    said = run("watch.py", "7", tmp_path / "frames", f"ws://127.0.0.1:{server.port}")

    saved = sorted((tmp_path / "frames").iterdir())
    assert said.split()[-1] == "succeeded"
    assert len(saved) == 10 + 9 + 1
    assert [path.name for path in saved[-3:]] == ["0030-image.png", "0030-x0.png", "0030-x_t.png"]
    assert seed_of(tmp_path / "frames" / "0030-image.png") == "7"


def test_the_client_saves_a_picture_and_its_frames(server: Server, tmp_path: Path) -> None:
    said = run("client.py", "7", tmp_path / "made", f"http://127.0.0.1:{server.port}")

    names = [path.name for path in sorted((tmp_path / "made").iterdir())]
    assert names == ["0000.png", "0005.png", "0010.png", "0015.png", "0020.png", "picture.png"]
    assert said.startswith("(8, 8) sha256:")


def test_the_asyncio_client_and_plain_http_get_the_same_bytes(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.port}"
    many = run("many.py", "8", tmp_path / "many", url)
    run("plain_http.py", "7", tmp_path / "7.png", url)

    assert sorted(many.split()[1::2]) == list("01234567")
    assert (tmp_path / "7.png").read_bytes() == (tmp_path / "many" / "7.png").read_bytes()


def test_the_cells_of_the_notebook_run_in_order(server: Server) -> None:
    said = run("notebook.py", f"http://127.0.0.1:{server.port}").splitlines()

    assert [line.split() for line in said[:-1]] == [[str(step), str(30 - step)] for step in STEPS]
    assert "succeeded> 4 " in said[-1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_a_contact_sheet_and_a_document(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("generate.sh", f"http://127.0.0.1:{server.port}")

    assert said.startswith('{"id":')
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (32, 24)


def test_the_engine_alone_draws_six_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["denoising.py", str(tmp_path / "denoising.png"), "10"])
    runpy.run_path(str(EXAMPLES / "denoising.py"))

    with Image.open(tmp_path / "denoising.png") as strip:
        assert strip.size == (11 * 32 * 3, 6 * 32 * 3)


def test_openais_package_saves_three_partial_images_and_the_picture(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.port}"
    said = run("openai_client.py", "7", tmp_path, url)

    assert said.split() == ["partial-0", "partial-1", "partial-2", "picture"]
    made = server.client.post("/generate", json={"label": 7, "seed": 7, "sampler": "ddim"})
    assert (tmp_path / "picture.png").read_bytes() == made.content
