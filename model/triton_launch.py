"""How kernels are launched on a device, and what a program of theirs may have there.

Programmatic dependent launch: a kernel starts while the one before it still ends, and waits inside for its results.

That hides most of what lies between two kernels, about a microsecond each. A kernel launched so must wait before it
touches memory, and no kernel is launched so that does not (`ready`): then whoever has waited for the one before it has
waited for all before that one, too. It takes Hopper or later, and Triton 3.4.
Importing this module imports Triton.
"""

from functools import cache

import torch
import triton
import triton.language as tl

AVAILABLE = hasattr(tl.extra.cuda, "gdc_wait")
WANTED = True  # a benchmark may ask what it gains


@triton.jit
def ready(DEPENDENT: tl.constexpr):
    """From here on, what the kernels before this one have written is there, and the next one may begin to start."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def _supported(device: torch.device) -> bool:
    return AVAILABLE and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch on this device: whether the kernel may start before the one in front of it has ended."""
    wanted = WANTED and _supported(device)
    return {"DEPENDENT": True, "launch_pdl": True} if wanted else {"DEPENDENT": False}


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have on this device; where there is none to ask, as on the smaller GPUs."""
    if device.type != "cuda":
        return 99 << 10
    most: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return most
