"""The same request gives the same picture, byte for byte, whatever it is asked with."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from ddpm_client import Client
from openai import OpenAI

from server.cli import main
from tests.server.conftest import Server

ASKED: dict[str, Any] = {"seed": 42, "steps": 9, "sampler": "ddim", "eta": 0.5}


def by_curl(server: Server, out: Path) -> bytes:
    if shutil.which("curl") is None:
        pytest.skip("curl is not here")
    url = f"http://127.0.0.1:{server.port}/generate"
    said = ["-H", "content-type: application/json", "-d", json.dumps(ASKED)]
    subprocess.run(["curl", "-sfX", "POST", url, *said, "-o", str(out)], check=True, timeout=60)
    return out.read_bytes()


def by_openai(server: Server, out: Path) -> bytes:
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        made = client.images.generate(prompt="", extra_body=ASKED).data or []
    return base64.b64decode(made[0].b64_json or "")


def by_openais_stream(server: Server, out: Path) -> bytes:
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        *_, last = client.images.generate(prompt="", stream=True, partial_images=2, extra_body=ASKED)
    return base64.b64decode(last.b64_json)


def by_our_client(server: Server, out: Path) -> bytes:
    with Client(f"http://127.0.0.1:{server.port}") as client:
        return client.generate(**ASKED).png


def by_our_command(server: Server, out: Path) -> bytes:
    flags = [word for name, value in ASKED.items() for word in (f"--{name}", str(value))]
    assert main.main(["generate", *flags, "--url", f"http://127.0.0.1:{server.port}", "-o", str(out)]) == 0
    return out.read_bytes()


@pytest.mark.parametrize("ask", [by_curl, by_openai, by_openais_stream, by_our_client, by_our_command])
def test_the_picture_is_the_one_that_httpx_gets(
    server: Server, tmp_path: Path, ask: Callable[[Server, Path], bytes]
) -> None:
    theirs = ask(server, tmp_path / "out.png")

    ours = httpx.post(f"http://127.0.0.1:{server.port}/generate", json=ASKED, timeout=60).content
    assert ours.startswith(b"\x89PNG")
    assert sha256(theirs).hexdigest() == sha256(ours).hexdigest()
