"""The device of an engine process: which one, the numbers it computes in, and its memory."""

import ctypes
import gc
import platform
from pathlib import Path

import torch

from model.checkpoint.card import ModelCard
from model.checkpoint.load import Model
from model.engine.footprint import Footprint, resident_bytes
from model.engine.runner import Runner, ranges, usual_buckets
from model.errors import NoSuchDevice
from model.nets.cpu import CpuNet, supports
from server.worker.messages import ModelStatus

UNLIMITED = 1 << 60
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """The device by its name in the settings. Raises NoSuchDevice."""
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    if index >= gpus:
        raise NoSuchDevice(f"device {wanted} was asked for, this machine has {gpus} GPUs")
    try:
        torch.cuda.init()
    except RuntimeError as error:  # most often a driver that is too old for this torch: it says so
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise NoSuchDevice(
            f"the {gpus} GPUs of this machine cannot be used (DDPM_DEVICE=cpu does without): {reason}"
        ) from error
    return torch.device("cuda", index)


def choose_dtype(wanted: str, device: torch.device, unusable: str = "") -> torch.dtype:
    """The numbers inside the net: unless the settings name them, bfloat16 where the device computes in it.

    unusable: why OpenVINO is not used on a CPU, if it is not. Then it is not asked either: the answer takes the same
    instructions, and float32 needs none that only some processors have.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if not unusable and supports(torch.bfloat16) else torch.float32


def usual_slots(device: torch.device) -> int:
    """How many pictures share a batch, if the settings do not say."""
    return 64 if device.type == "cuda" else 8


def device_name(device: torch.device) -> str:
    """The name that the device gives itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(runner: Runner, model: Model, load_s: float, grown_bytes: int) -> ModelStatus:
    """The status of a loaded model. grown_bytes: of a GPU, held since the load began."""
    device, net, name = runner.device, model.net, device_name(runner.device)
    computes_in = net.dtype if isinstance(net, CpuNet) else model.table.dtype
    dtype, exact = str(computes_in).removeprefix("torch."), f"exact {ranges(runner.exact_buckets)}"
    parts = [name, f"torch {torch.__version__}"]
    if isinstance(net, CpuNet):
        parts += [f"{net.threads} threads", net.runtime]
    elif device.type == "cuda":
        parts += [f"cudnn {torch.backends.cudnn.version()}"]
    parts += [dtype, exact, *([str(runner.chosen)] if runner.chosen else [])]
    parts += [f"bits {runner.bits}"] if runner.bits else []
    return ModelStatus(
        digest=model.digest,
        device=f"{device} ({name})",
        dtype=dtype,
        parameters=model.parameters,
        slots=runner.slots.capacity,
        buckets=runner.buckets,
        exact_buckets=runner.exact_buckets,
        admitted=runner.admitted,
        exact=runner.exact,
        numerics="; ".join(parts),
        load_s=load_s,
        memory_bytes=grown_bytes if device.type == "cuda" else resident_bytes(model, runner.slots),
        note=runner.note,
    )


def held_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process has taken."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def announce(card: ModelCard, device: torch.device, dtype: torch.dtype, slots: int, size: Footprint) -> ModelStatus:
    """The status of a model that is not loaded. Its numerics class is known only when it runs."""
    buckets = usual_buckets(slots)
    return ModelStatus(
        digest=card.digest,
        device=f"{device} ({device_name(device)})",
        dtype=str(dtype).removeprefix("torch."),
        parameters=size.parameters,
        slots=slots,
        buckets=buckets,
        exact_buckets=[],
        admitted=buckets,
        exact=False,
        numerics="",
        loaded=False,
        memory_bytes=size.size_bytes,
    )


def refuse(reason: str) -> ModelStatus:
    """The status of a model that cannot be loaded, of which nothing else is known."""
    sizes: list[int] = []
    return ModelStatus(
        digest="",
        device="",
        dtype="",
        parameters=0,
        slots=0,
        buckets=sizes,
        exact_buckets=sizes,
        admitted=sizes,
        exact=False,
        numerics="",
        loaded=False,
        trouble=reason,
    )


def has_room(size_bytes: int) -> bool:
    """Whether a CPU's memory has room for so much, and as much again for all other processes."""
    return 2 * size_bytes <= available_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def available_bytes(meminfo: Path, group: Path) -> int:
    """Memory that this process may still take, according to Linux and to its control group; UNLIMITED if neither says
    anything."""
    known = [UNLIMITED]
    try:
        known += [int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        known += [] if limit == "max" else [int(limit) - int(used)]
    except (OSError, ValueError):
        pass
    return min(known)


def give_back(device: torch.device) -> None:
    """Returns memory that nothing refers to any more to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
