"""The examples do what they say."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.model.directories import write_model
from tests.server.conftest import Server

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny model."""
    running = Server(write_model(tmp_path_factory.mktemp("weights") / "tiny"))
    try:
        yield running.wait_until_ready()
    finally:
        running.stop()


def test_watching_saves_every_frame_and_the_picture(server: Server, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "watch.py"),
        "7",
        str(tmp_path / "frames"),
        f"ws://127.0.0.1:{server.port}",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    saved = sorted((tmp_path / "frames").iterdir())
    assert said.split()[-1] == "succeeded"
    assert len(saved) == 10 + 9 + 1
    assert [path.name for path in saved[-3:]] == ["0030-image.png", "0030-x0.png", "0030-x_t.png"]
    with Image.open(tmp_path / "frames" / "0030-image.png") as picture:
        assert picture.info["seed"] == "7"


def test_openais_package_saves_three_partial_images_and_the_picture(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, str(EXAMPLES / "openai_client.py"), "7", str(tmp_path), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert said.split() == ["partial-0", "partial-1", "partial-2", "picture"]
    made = server.client.post("/generate", json={"seed": 7, "sampler": "ddim"})
    assert (tmp_path / "picture.png").read_bytes() == made.content
