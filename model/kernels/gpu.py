"""Settings of a GPU's libraries, which hold for the whole process, and errors after which nothing works on a GPU."""

import torch

NO_MEMORY = "Triton Error [CUDA]: out of memory"


def prepare_gpu(exact: bool, dtype: torch.dtype) -> None:
    """Sets the libraries up for nets of this dtype. All models of a process have the same `exact`."""
    # torch prefers cuDNN's attention on some GPUs, which builds a plan for each batch and length, half a second each.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Exact: only engines with a fixed order of addition, and none chosen by timing, which may differ at the next start.
    # Otherwise cuDNN takes the fastest of those it tries.
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.benchmark = not exact
    if dtype == torch.float32:  # TF32 keeps ten of the 23 bits
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def raise_if_fatal(error: Exception, device: torch.device) -> None:
    """Raises the error if no other kernel can be tried on this device; returns if it concerns the one kernel alone.

    Exhausted memory is no reason to choose another kernel: with more of it, the next start would choose differently.
    After an illegal access nothing works on the GPU. Some errors do not say so themselves, so the GPU is synchronised,
    which raises then.
    """
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "CUDA error" in str(error):
        raise error
    if NO_MEMORY in str(error):
        raise torch.OutOfMemoryError(str(error)) from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)
