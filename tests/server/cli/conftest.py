"""The command as a process of its own, and the address of the server that it may ask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import Server


@pytest.fixture
def url(server: Server) -> str:
    """The URL of the server that all tests share."""
    return f"http://127.0.0.1:{server.port}"


def ddpm(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")} | variables
    command = [sys.executable, "-m", "server", *map(str, words)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
