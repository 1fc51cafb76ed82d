"""A GPU's settings, which hold for the whole process, and its errors: which of them leave nothing to try."""

import torch

NO_MEMORY = "Triton Error [CUDA]: out of memory"


def prepare_gpu(exact: bool, dtype: torch.dtype) -> None:
    """Sets the libraries up for nets of this dtype. All models of a process have the same `exact`."""
    # torch prefers cuDNN's attention on some GPUs, which builds a plan for each batch and length, half a second each.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Exact: no engine that adds in any order it likes, and none chosen by a stopwatch, which another start would read
    # otherwise. Else the fastest of those that are tried is taken.
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.benchmark = not exact
    if dtype == torch.float32:  # float32 is float32: TF32 keeps ten of its 23 bits
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def raise_if_fatal(error: Exception, device: torch.device) -> None:
    """Raises what ends a trial on this device; returns if the error speaks of the kernel that was tried alone.

    Memory that ran out is no reason to choose another kernel: with more of it, the next start would choose otherwise.
    Behind an illegal access nothing works any more. Not every error says so itself: the GPU is asked.
    """
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "CUDA error" in str(error):
        raise error
    if NO_MEMORY in str(error):
        raise torch.OutOfMemoryError(str(error)) from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)
