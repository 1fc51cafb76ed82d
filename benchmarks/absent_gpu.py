"""A GPU that is not there, as far as Triton's compiler asks for one; the meta device stands for its memory.

A meta tensor has a shape, a layout and an address from 0 on, but no memory. So whole nets can be run, and what Triton
makes of a kernel's arguments (their types, which of them are 1 or divisible by 16) is what it makes of them on a GPU.
"""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import model.nets.layers
from deploy.image_triton import stub
from model.kernels import conv, launch

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program may have
LEAST_SHARED_BYTES = 99 << 10  # on all others
_numbers = count()


class Driver:
    """As much of Triton's driver as compiling takes. arch: 90 for sm_90"""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.device = next(_numbers)  # Triton remembers by this number what it has compiled

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Reads(TorchFunctionMode):
    """What comes to the host from a device without memory: ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.numpy:
            return np.ones(args[0].shape, np.uint8)
        return func(*args, **(kwargs or {}))


@contextmanager
def launching(arch: int, launched: Callable[[Any], object], device: torch.device) -> Iterator[None]:
    """What is launched on this device is compiled for a GPU that is not there, and handed over."""
    run = JITFunction.run

    def compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **how: Any) -> None:
        launched(run(kernel, *args, grid=grid, warmup=True, **how))

    driver.set_active(Driver(arch))
    model.nets.layers._triton_works.cache_clear()
    try:
        with (
            patch.object(JITFunction, "run", compile),
            patch.object(model.nets.layers, "TRITON_ON", frozenset({device.type})),
            patch.object(launch, "_supported", lambda device: arch >= 90),
            patch.object(conv, "shared_bytes", lambda device: SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)),
            torch.inference_mode(),
            Reads(),
        ):
            yield
    finally:
        driver.set_active(None)
        model.nets.layers._triton_works.cache_clear()


def compile_launchers(kernels: Iterable[Any]) -> None:
    """Has Triton compile what it reaches the driver by, which takes a C compiler, and puts into its cache as well.

    Up to Triton 3.6 that is a function for each signature that a kernel has, later one for all.
    """
    source = "".join(Path(nvidia.__file__).with_name(name).read_text() for name in ("driver.c", "driver.py"))
    with TemporaryDirectory() as scratch, patch.dict(os.environ, TRITON_LIBCUDA_PATH=scratch):
        ctypes.CDLL(str(stub(source, Path(scratch))), ctypes.RTLD_GLOBAL)  # found when the functions are loaded
        reached = Driver(0)
        reached.utils = nvidia.CudaUtils()  # type: ignore[attr-defined]
        driver.set_active(reached)
        try:
            for kernel in kernels:
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
        finally:
            driver.set_active(None)
