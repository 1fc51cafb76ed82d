"""Installs PyTorch without CUDA's libraries where there is no GPU, before `make serve` installs the rest.

    .venv/bin/python deploy/torch_build.py --index URL [--build cpu|cuda]

On Linux the default build of PyTorch needs CUDA's libraries and Triton: 2.7 GB of wheels instead of 0.2 GB. So where
there is no NVIDIA driver, the build without them is installed from its own index. If that index does not have it, if
there is a driver, or if pip was told where to look, pip installs the build that it finds.
"""

import argparse
import ctypes
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
PLACES = ("index-url", "extra-index-url", "find-links", "no-index")  # pip's options for where to look
PATIENCE_S = 20  # for an index that does not answer; a slow download is limited by pip only


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed."""
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def pip(*words: str, timeout_s: float | None = None) -> tuple[bool, str]:
    """Runs pip. -> (whether it succeeded, its output, or the last line of its errors)"""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {timeout_s:g} s"
    return ran.returncode == 0, ran.stdout if ran.returncode == 0 else (ran.stderr.splitlines() or [""])[-1]


def told_where_to_look() -> list[str]:
    """The options in a file or in the environment that tell pip where to look."""
    _, lines = pip("config", "list")
    return sorted({name for name in re.findall(r"^\S*\.([\w-]+)=", lines, re.MULTILINE) if name in PLACES})


def pinned() -> str:
    """The version of torch that this project requires."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    (version,) = [line.removeprefix("torch==") for line in project["dependencies"] if line.startswith("torch==")]
    return str(version)


def why_not(build: str | None) -> str | None:
    """The reason not to install the build without CUDA, or None."""
    if build is not None:
        return None if build == "cpu" else "TORCH=cuda"
    if not sys.platform.startswith("linux"):
        return f"on {sys.platform} it has no CUDA"
    if has_driver():
        return "there is an NVIDIA driver"
    told = told_where_to_look()
    return f"pip was told where to look ({', '.join(told)})" if told else None


def install_without_cuda(version: str, index: str) -> str | None:
    """Installs the build without CUDA. -> the error, or None"""
    words = ("index", "versions", "torch", "--index-url", index, "--timeout", "5", "--retries", "0")
    reached, said = pip(*words, timeout_s=PATIENCE_S)
    if not reached:
        return said
    if re.search(rf"(?<![\w.]){re.escape(version)}\+cpu(?![\w.])", said) is None:
        return "it is not there for this machine and this Python"
    done, said = pip("install", "--quiet", "--no-deps", "--index-url", index, f"torch=={version}+cpu")
    return None if done else said


def main() -> None:
    """Prints what it installs. Fails only if `--build cpu` was given and that build cannot be installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--index", required=True, help="where the build without CUDA is")
    parser.add_argument("--build", choices=["cpu", "cuda"], help="which to install, whatever this machine has")
    given = parser.parse_args()
    usual = "PyTorch: the build that pip finds"
    if (reason := why_not(given.build)) is not None:
        print(f"{usual}, since {reason}")
        return
    wrong = install_without_cuda(pinned(), given.index)
    if wrong is None:
        print("PyTorch: the build without CUDA (0.2 GB); `make clean`, then TORCH=cuda takes the other")
    elif given.build is None:
        print(f"{usual}, with CUDA's libraries (2.7 GB), since the one without could not be had: {wrong}")
    else:
        sys.exit(f"no build of PyTorch without CUDA from {given.index}: {wrong}")


if __name__ == "__main__":
    main()
