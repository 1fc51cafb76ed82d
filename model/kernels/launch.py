"""How kernels are launched on a device, and how much shared memory a program has there.

Programmatic dependent launch: a kernel starts while the one before it still ends, and waits inside for its results.
That hides most of the gap between two kernels, about a microsecond each. Such a kernel must wait before it touches
memory, and every kernel launched in this way does (`ready`), so that waiting for one kernel is waiting for all before
it. The wait must come before the first loop: inside one, Triton moves loads above it (triton-lang/triton#11905). It
needs Hopper and Triton 3.4; whether a graph can hold such launches is tried. Importing this module imports Triton.
"""

import logging
from functools import cache

import torch
import triton
import triton.language as tl

from model.errors import attempt

AVAILABLE = hasattr(tl.extra.cuda, "gdc_wait")
WANTED = True  # a benchmark may measure what it gains
CHAIN = 16  # kernels in the trial
logger = logging.getLogger(__name__)


@triton.jit
def ready(DEPENDENT: tl.constexpr):
    """Waits for the results of all kernels before this one, and lets the next one start."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _count(numbers, DEPENDENT: tl.constexpr):
    at = numbers + tl.program_id(0) * 128 + tl.arange(0, 128)
    ready(DEPENDENT)
    tl.store(at, tl.load(at) + 1)


def _chain_counts(device: torch.device) -> bool:
    """Whether a graph of kernels launched in this way gives the results of the same kernels one after another. Some
    other operations are among them, as a library may put them there."""
    numbers, other = torch.zeros(2, 64 * 128, dtype=torch.int32, device=device)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    _count[(64,)](numbers, DEPENDENT=True, launch_pdl=True)
    usual = torch.cuda.stream(torch.cuda.current_stream(device))  # restored if the capture fails
    captured = False
    try:
        with usual, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            for i in range(CHAIN):
                _count[(64,)](numbers, DEPENDENT=True, launch_pdl=True)
                if i % 4 == 0:
                    other.zero_()
        captured = True
    finally:
        if not captured:  # the allocator would stay in the capture, and no other could begin
            getattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None)(device.index or 0, pool)
    graph.replay()
    return bool((numbers == 1 + CHAIN).all())


@cache
def _supported(device: torch.device) -> bool:
    if not AVAILABLE or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    counts, reason = attempt(lambda: _chain_counts(device)), "they run before their input is written"
    if isinstance(counts, torch.OutOfMemoryError):
        raise counts
    if isinstance(counts, Exception):  # of a driver or a compiler: kernels start one after another then
        torch.cuda.synchronize(device)  # raises if nothing works on the device any more
        counts, reason = False, f"{type(counts).__name__}: {counts}"
    if not counts:
        logger.warning("no kernel starts before the one in front of it has ended on %s: %s", device, reason)
    return counts


def dependent(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch on this device: whether the kernel may start before the one in front of it has ended."""
    wanted = WANTED and _supported(device)
    return {"DEPENDENT": True, "launch_pdl": True} if wanted else {"DEPENDENT": False}


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have on this device; on a CPU, as much as on the smaller GPUs."""
    if device.type != "cuda":
        return 99 << 10
    most: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return most
