"""Which build of PyTorch `make serve` installs: without CUDA's libraries where nothing could use them."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from zipfile import ZipFile

import pytest

from tests.deploy.files import DEPLOY, ROOT

SCRIPT = DEPLOY / "torch_build.py"
VERSION = "2.13.0"
INDEX = "http://127.0.0.1:9/whl/cpu"
CPU = ("install", f"torch=={VERSION}+cpu")
PIP = """
import json, os, sys, time
words = [word for word in sys.argv[1:] if word != "--disable-pip-version-check"]
print(json.dumps(words), file=open(os.environ["LOG"], "a"))
if words == ["config", "list"]:
    print(os.environ.get("CONFIG", ""))
elif words[0] == "index":
    sys.exit("ERROR: no matching distribution") if os.environ["VERSIONS"] == "" else print(os.environ["VERSIONS"])
elif words[0] == "install":
    sys.exit(int(os.environ.get("BROKEN", "0")))
"""


class World:
    """A machine on which pip only writes down what it is told, and the driver is there or not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        (folder / "modules").mkdir()
        (folder / "modules" / "pip.py").write_text(PIP)
        self.variables = {"LOG": str(self.log), "VERSIONS": f"torch (9.9.9+cpu)\nAvailable: 9.9.9+cpu, {VERSION}+cpu"}

    def add_driver(self) -> None:
        """From now on there is NVIDIA's tool."""
        (self.folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
        (self.folder / "bin" / "nvidia-smi").chmod(0o755)

    def install(
        self, *words: str, code: int = 0, variables: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[list[tuple[str, str]], str]:
        """What pip was told to install, in the first and the last word each time, and what was said."""
        paths = {"PATH": str(self.folder / "bin"), "PYTHONPATH": str(self.folder / "modules")}
        command = [sys.executable, str(SCRIPT), "--index", INDEX, *words]
        ran = subprocess.run(
            command, env={**paths, **self.variables, **variables}, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == code, ran.stderr
        asked = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [(line[0], line[-1]) for line in asked if line[0] == "install"], ran.stdout + ran.stderr


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A machine without a driver."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    return World(tmp_path)


def test_without_a_driver_the_build_without_cuda_is_installed(world: World) -> None:
    installed, said = world.install()

    assert installed == [CPU]
    assert "the build without CUDA (0.2 GB)" in said


def test_with_a_driver_pip_installs_what_it_finds(world: World) -> None:
    world.add_driver()

    assert world.install() == ([], "PyTorch: the build that pip finds, since there is an NVIDIA driver\n")


@pytest.mark.parametrize(
    "line",
    [
        "global.index-url='https://packages.example/simple'",
        "global.extra-index-url='https://packages.example/simple'",
        ":env:.find-links='/wheels'",
        "install.no-index='true'",
    ],
)
def test_whoever_told_pip_where_to_look_is_obeyed(world: World, line: str) -> None:
    installed, said = world.install(variables={"CONFIG": f":env:.timeout='9'\n{line}"})

    assert installed == []
    assert "pip was told where to look" in said


@pytest.mark.parametrize(
    "variables", [{"VERSIONS": ""}, {"VERSIONS": f"{VERSION}1+cpu, 1{VERSION}+cpu"}, {"BROKEN": "1"}]
)
def test_where_that_build_cannot_be_had_the_other_is_taken_unless_it_was_named(
    world: World, variables: dict[str, str]
) -> None:
    _, said = world.install(variables=variables)
    _, refused = world.install("--build", "cpu", code=1, variables=variables)

    assert "with CUDA's libraries (2.7 GB)" in said
    assert f"no build of PyTorch without CUDA from {INDEX}" in refused


def test_either_build_can_be_named(world: World) -> None:
    assert world.install("--build", "cuda")[0] == []
    world.add_driver()
    assert world.install("--build", "cpu", variables={"CONFIG": ":env:.find-links='/wheels'"})[0] == [CPU]


@pytest.mark.parametrize(("stamp", "installed"), [("serve", "--editable ."), ("test", "--editable '.[test]'")])
def test_make_hands_on_which_build_is_named_before_all_else_is_installed(stamp: str, installed: str) -> None:
    def planned(*words: str) -> list[str]:
        command = ["make", "--dry-run", "--always-make", "-C", str(ROOT), f".venv/{stamp}.stamp", *words]
        environ_of = {name: value for name, value in os.environ.items() if name not in ("TORCH", "CPU_WHEELS")}
        said = subprocess.run(command, env=environ_of, capture_output=True, text=True, check=True).stdout
        return [line.strip() for line in said.splitlines() if "torch_build" in line or "--editable" in line]

    script = ".venv/bin/python deploy/torch_build.py --index"
    assert planned()[0] == f"{script} https://download.pytorch.org/whl/cpu"
    assert planned("TORCH=cuda")[0] == f"{script} https://download.pytorch.org/whl/cpu --build cuda"
    assert planned("TORCH=cpu", f"CPU_WHEELS={INDEX}")[0] == f"{script} {INDEX} --build cpu"
    assert planned()[1].endswith(installed) and len(planned()) == 2


class Index:
    """An index of packages with one wheel, and pip in an environment of its own that nobody has told anything."""

    def __init__(self, folder: Path) -> None:
        (folder / "torch").mkdir()
        wheel = folder / "torch" / f"torch-{VERSION}+cpu-py3-none-any.whl"
        about = f"torch-{VERSION}+cpu.dist-info"
        with ZipFile(wheel, "w") as archive:
            archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}+cpu\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        (folder / "torch" / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever).start()
        venv.create(folder / "venv", with_pip=True)
        self.python = folder / "venv" / "bin" / "python"

    def run(self, *words: str, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
        """The environment's Python, with pip's own settings. Raises TimeoutExpired after `limit_s` seconds."""
        told = {"PATH": "/nowhere", "PIP_CONFIG_FILE": os.devnull, "HOME": "/nowhere"}
        return subprocess.run([self.python, *words], env=told, capture_output=True, text=True, timeout=limit_s)

    def close(self) -> None:
        """Nobody answers any more."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """An index that answers."""
    made = Index(tmp_path_factory.mktemp("index"))
    yield made
    made.close()


@pytest.mark.long
def test_pip_finds_the_build_and_takes_it_for_the_version_that_is_pinned(index: Index) -> None:
    ran = index.run(str(SCRIPT), "--index", index.url, "--build", "cpu")
    later = index.run("-m", "pip", "install", "--no-index", f"torch=={VERSION}")

    assert ran.returncode == 0, ran.stderr
    assert later.stdout.startswith(f"Requirement already satisfied: torch=={VERSION}")
    assert f"torch=={VERSION}" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.long
def test_an_index_that_never_answers_costs_seconds(index: Index) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ran = index.run(str(SCRIPT), "--index", place, "--build", "cpu", limit_s=30)

    assert ran.returncode == 1 and "no build of PyTorch without CUDA" in ran.stderr
