"""Stage facts: what this machine is, and what it can do at best."""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn import functional as F

from benchmarks.engine import ceilings
from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.stage import Part
from benchmarks.gpu.worlds import device_of
from benchmarks.measure import commit
from model.nets.layers import uses_triton
from server.worker.device import device_name

ASKED_S = 10  # how long nvidia-smi may take


def parts(setting: Setting) -> list[Part]:
    """What is known at once comes first."""
    device = device_of(setting)
    return [
        versions,
        driver,
        partial(hardware, device),
        partial(first_calls, device),
        partial(triton, device),
        partial(best_it_can, device, 256 if setting.dry else 0),
    ]


def versions() -> Iterator[Fact]:
    """Of what is measured, and of what it runs on."""
    yield Fact("commit", commit(), main=True)
    yield Fact("Python", platform.python_version())
    yield Fact("torch", torch.__version__, main=True)
    yield Fact("CUDA of torch", torch.version.cuda or "none")
    yield Fact("cuDNN", str(torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else "none"))
    for package in ("triton", "numpy", "diffusers"):
        try:
            yield Fact(package, version(package))
        except PackageNotFoundError:
            yield Fact(package, "none")


def driver() -> Iterator[Fact]:
    """What the driver's own tool says."""
    if shutil.which("nvidia-smi") is None:
        yield Fact("nvidia-smi", "none")
        return
    asked = {"nvidia-smi -L": ["-L"], "driver": ["--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]}
    for name, arguments in asked.items():
        said = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=ASKED_S, check=False)
        yield Fact(name, "; ".join(said.stdout.strip().splitlines()) or said.stderr.strip())


def hardware(device: torch.device) -> Iterator[Fact]:
    """The device, by its name and its numbers."""
    yield Fact("device", device_name(device), main=True)
    if device.type == "cuda":
        seen = torch.cuda.get_device_properties(device)
        yield Fact("compute capability", f"{seen.major}.{seen.minor}")
        yield Fact("multiprocessors", seen.multi_processor_count)
        yield Fact("L2 cache", seen.L2_cache_size / 2**20, "MiB")
        yield Fact("memory", seen.total_memory / 2**30, "GiB")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """One call, to its end."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@torch.inference_mode()
def first_calls(device: torch.device) -> Iterator[Fact]:
    """What a library takes to begin, and for a shape that it has not met."""

    def convolve(batch: int) -> object:
        x, weight = (torch.randn(n, 64, 3, 3, device=device, dtype=torch.bfloat16) for n in (batch, 64))
        return F.conv2d(x, weight, padding=1)

    def attend(batch: int) -> object:
        q, k, v = torch.randn(3, batch, 1, 64, 64, device=device, dtype=torch.bfloat16)
        return F.scaled_dot_product_attention(q, k, v)

    for name, call in (("convolution", convolve), ("attention", attend)):
        yield Fact(f"{name}, the first", seconds(partial(call, 3), device), "s")
        yield Fact(f"{name}, a new shape", seconds(partial(call, 5), device), "s")


@torch.inference_mode()
def triton(device: torch.device) -> Iterator[Fact]:
    """Whether Triton's kernels run, found out by the smallest."""
    began = time.perf_counter()
    works = uses_triton(torch.zeros(8, 4, 4, device=device))
    took_s = time.perf_counter() - began
    yield Fact("Triton runs here", works, more={"seconds": round(took_s, 2)})


def best_it_can(device: torch.device, side: int) -> Iterator[Fact]:
    """What no net can go beyond."""
    flops, copied = ceilings(device, side)
    yield Fact("copies", copied / 1e9, "GB/s")
    yield Fact("bfloat16 matrix products", flops / 1e12, "TFLOP/s")
