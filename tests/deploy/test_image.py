"""The Dockerfile, and what makes Triton run without a compiler. `make image` builds and runs all of it."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from server import __version__
from server.settings import Settings
from tests.deploy.files import DEPLOY, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
USE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
from triton.backends.nvidia import driver
driver.CudaUtils().launch
"""

INFER = """
import sys
sys.modules["openvino_telemetry"] = None
import numpy as np, openvino as ov
from openvino import opset13 as op
core, x = ov.Core(), op.parameter([1, 2, 4, 4], np.float32)
weights = op.constant(np.ones((3, 2, 1, 1), np.float32))
net = ov.Model([op.result(op.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1]))], [x], "net")
print(ov.__file__, core.available_devices, core.compile_model(net, "CPU")(np.ones((1, 2, 4, 4), np.float32))[0].sum())
"""


def stages() -> dict[str, str]:
    """The instructions of each stage, by its name."""
    pieces = re.split(r"^FROM (\S+) AS (\S+)\n", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {name: text for _, name, text in zip(*[iter(pieces)] * 3, strict=True)}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_last_thing_said_is_who_runs_it(target: str) -> None:
    said = [line for line in stages()[target].splitlines() if line and line[0] != "#"]

    assert said[-1] == "USER 10001:10001"


def test_what_is_built_by_default_is_for_gpus() -> None:
    assert list(stages())[-1] == "cuda"


def test_compiled_kernels_outlive_a_container() -> None:
    cache = re.search(r"\bTRITON_CACHE_DIR=(\S+)", stages()["cuda"])
    volumes = re.findall(r"^VOLUME (\S+)$", stages()["bare"], re.MULTILINE)

    assert cache is not None and [volume for volume in volumes if Path(cache[1]).is_relative_to(volume)]


def test_packages_are_held_to_the_constraints() -> None:
    assert "PIP_CONSTRAINT=/build/constraints.txt" in stages()["packages"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    assert pins == sorted(pins, key=str.lower)


def test_the_dockerfile_names_no_place_to_fetch_packages_from() -> None:
    options = re.findall(r"--(?:extra-)?index-url (\S+)|--find-links (\S+)", DOCKERFILE)

    assert re.findall(r"\w+://[^:{]*", DOCKERFILE) == ["http://127.0.0.1"]  # of the health check
    assert re.findall(r"\b(?:[\w-]+\.)+(?:org|com|net|io)\b", DOCKERFILE) == []
    assert options == [('"$TORCH_INDEX"}', "")] * 2
    assert re.findall(r"^ARG \w*(?:INDEX|LINKS)\w*=", DOCKERFILE, re.MULTILINE) == []


@pytest.mark.parametrize("stage", ["packages-cpu", "packages-cuda", "source"])
def test_whoever_builds_can_tell_pip_where_to_look(stage: str) -> None:
    asked = re.findall(r"^ARG (PIP_\w+)$", stages()[stage], re.MULTILINE)

    assert asked == ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"]
    assert "RUN --mount=type=secret,id=pip,target=/etc/pip.conf" in stages()[stage]


@pytest.mark.parametrize(
    ("stage", "index", "requires", "told"),
    [
        ("packages-cpu", "", "numpy", [[], []]),
        ("packages-cpu", "http://127.0.0.1:9/cpu", "numpy", [["--index-url", "http://127.0.0.1:9/cpu"], []]),
        ("packages-cpu", "", "cuda-toolkit", [[]]),  # it would bring gigabytes that nothing in this image can use
        ("packages-cuda", "", "cuda-toolkit", [[], []]),
        ("packages-cuda", "http://127.0.0.1:9/13", "cuda-toolkit", [["--index-url", "http://127.0.0.1:9/13"], []]),
    ],
)
def test_torch_comes_from_its_own_index_only_if_one_is_named(
    tmp_path: Path, stage: str, index: str, requires: str, told: list[list[str]]
) -> None:
    info = tmp_path / "venv" / "lib" / "python3.11" / "site-packages" / "torch-2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: torch\nRequires-Dist: {requires}>=1\n")
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/log\n")
    (tmp_path / "python").chmod(0o755)
    (script,) = re.findall(r"^RUN --mount=\S+ \\\n((?:.*\\\n)*.*)$", stages()[stage], re.MULTILINE)
    script = script.replace("/venv", str(tmp_path / "venv"))
    environ = {"PATH": f"{tmp_path}:{os.defpath}", "TORCH_INDEX": index}
    ran = subprocess.run(["sh", "-c", script], env=environ, capture_output=True, text=True)
    installed = [line.split() for line in (tmp_path / "log").read_text().splitlines() if " install " in line]

    assert [[word for word in words if word == "--index-url" or "://" in word] for words in installed] == told
    assert ("--build-arg TORCH_INDEX=URL" in ran.stderr) == (ran.returncode != 0) == (len(told) == 1), ran.stderr


def test_nothing_is_downloaded_into_what_is_shipped() -> None:
    shipped = stages()["bare"] + stages()["cpu"] + stages()["cuda"]

    assert re.findall(r"apt-get|\bpip\b|curl|wget|gcc", shipped) == []


def test_everything_that_starts_does_so_without_a_shell() -> None:
    started = re.findall(r"^\s*(?:CMD|ENTRYPOINT) (.*)", DOCKERFILE, re.MULTILINE)

    assert len(started) == 3 and all(words.startswith("[") for words in started)


def test_the_image_sets_settings_that_there_are() -> None:
    assert set(re.findall(r"\b(DDPM_\w+)=", DOCKERFILE)) <= set(Settings.variables())


def test_an_image_tells_its_version_and_revision() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*)"', stages()["bare"]))

    assert (labels["version"], labels["revision"]) == ("$VERSION", "$REVISION")
    assert f"\nARG VERSION={__version__}\n" in stages()["bare"] and "\nARG REVISION=" in stages()["bare"]


def test_what_the_build_copies_is_sent_to_it() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word for words in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in words.split()
    ]

    assert set(copied) == set(sent)


def test_the_base_has_the_python_that_is_asked_for() -> None:
    base = re.search(r"^ARG PYTHON=python:(\d+)\.(\d+)\.\d+-slim-(\w+)$", DOCKERFILE, re.MULTILINE)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]

    assert base is not None
    assert wanted == f">={base[1]}.{base[2]}"


@pytest.mark.skipif(find_spec("triton") is None or shutil.which("gcc") is None, reason="triton or gcc is not installed")
def test_triton_reaches_the_driver_without_a_compiler(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "image_triton.py", tmp_path)
    library = "import image_triton as i, pathlib as p; from triton.backends.nvidia import driver as d; "
    library += "i.stub((p.Path(d.__file__).parent / 'driver.c').read_text(), p.Path('.'))"
    for words in (["image_triton.py"], ["-c", library]):
        subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
    image = {
        "PATH": str(tmp_path / "nothing"),
        "PYTHONPATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        **dict(re.findall(r"(TRITON_CACHE_MANAGER|TRITON_LIBCUDA_PATH)=(\S+)", DOCKERFILE)),
    }
    use = [sys.executable, "-c", USE, str(tmp_path / "libcuda.so.1")]
    bare = {name: value for name, value in image.items() if name != "TRITON_CACHE_MANAGER"}

    assert subprocess.run(use, env=image, cwd=os.sep).returncode == 0
    failed = subprocess.run(use, env=bare, cwd=os.sep, capture_output=True, text=True)
    assert "Failed to find C compiler" in failed.stderr


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_what_the_image_lacks_of_openvino_is_not_needed_on_a_cpu(tmp_path: Path) -> None:
    found = find_spec("openvino")
    assert found is not None and found.origin is not None
    shutil.copytree(Path(found.origin).parent, tmp_path / "openvino", ignore=shutil.ignore_patterns("__pycache__"))
    (find,) = re.findall(r"find /venv (.*?)\n\n", stages()["packages-cpu"].replace("\\\n", ""), re.DOTALL)
    without = shlex.split(f"find {tmp_path} {find}")
    gone = subprocess.run(without, capture_output=True, text=True, check=True).stdout.splitlines()
    there = {"PYTHONPATH": str(tmp_path), "PATH": os.defpath}
    ran = subprocess.run([sys.executable, "-c", INFER], env=there, capture_output=True, text=True, cwd=os.sep)

    assert len(gone) == 10 or platform.machine() != "x86_64"
    assert ran.stdout == f"{tmp_path / 'openvino' / '__init__.py'} ['CPU'] 96.0\n", ran.stderr
