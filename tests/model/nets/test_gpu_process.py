"""What holds for a process on a GPU, shown without one: the libraries' settings, and errors that end a start."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import model.nets.layers
from model.kernels.gpu import NO_MEMORY, prepare_gpu, raise_if_fatal
from model.nets.convolution import Conv, Projection
from model.nets.exact import choose_kernels
from tests.model.tiny import CPU

GPU = torch.device("cuda")


def died(device: torch.device) -> None:
    """What a GPU says that has died, whatever it is asked."""
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def settings() -> Iterator[None]:
    """The settings of this process are afterwards as they were."""
    cudnn, matmul, attention = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.cuda.cudnn_sdp_enabled()
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.backends.cuda.enable_cudnn_sdp(attention)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("exact", [True, False])
def test_cudnn_times_its_engines_only_without_the_promise(exact: bool) -> None:
    prepare_gpu(exact, torch.bfloat16)

    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (exact, not exact)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_keeps_all_its_bits_and_other_types_leave_the_choice_as_it_was(dtype: torch.dtype) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    prepare_gpu(True, dtype)

    allowed = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    assert allowed == ((False, False) if dtype == torch.float32 else (True, True))


# Errors in a trial


def test_an_error_of_one_kernel_is_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    raise_if_fatal(RuntimeError("out of resource: shared memory, Required: 300000"), GPU)
    raise_if_fatal(RuntimeError("a compiler is missing"), CPU)

    assert asked == [GPU]


def test_a_dead_gpu_raises_whatever_the_first_error_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", died)

    with pytest.raises(torch.AcceleratorError):
        raise_if_fatal(RuntimeError("Triton Error [CUDA]: unspecified launch failure"), GPU)


FATAL = {
    "a dead GPU": (torch.AcceleratorError("CUDA error: misaligned address"), torch.AcceleratorError),
    "a library on it": (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), RuntimeError),
    "no memory": (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    "no memory, in Triton's words": (RuntimeError(NO_MEMORY), torch.OutOfMemoryError),
}


class Trial(nn.Module):
    """A net of one layer, whose bits depend on the batch, and whose invariant kernel fails."""

    class Layer(Conv):
        error: Exception

        def forward(self, x: Tensor, add: Tensor | Projection | None = None, *, whole: bool = True) -> Tensor:
            if self.invariant:
                raise self.error
            return x * (1 + 2**-10 * len(x))

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer = self.Layer(1, 1, 1)
        self.layer.error = error

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@torch.inference_mode()
def chosen(error: Exception) -> bool:
    """Whether the layer has its invariant kernel in the end."""
    net = Trial(error)
    for _ in choose_kernels(net, lambda: net(torch.zeros(1, 1, 4, 4)), [1, 2]):
        pass
    return net.layer.invariant


def test_a_kernel_that_fails_is_replaced_by_the_librarys() -> None:
    assert not chosen(RuntimeError("out of resource: shared memory"))


@pytest.mark.parametrize("name", FATAL)
def test_a_fatal_error_in_a_trial_ends_the_start(name: str) -> None:
    error, kind = FATAL[name]

    with pytest.raises(kind):
        chosen(error)


@pytest.mark.parametrize("name", FATAL)
def test_such_an_error_is_not_mistaken_for_a_machine_without_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, kind = FATAL[name]

    def fails(*size: int, **how: object) -> Tensor:
        raise error

    monkeypatch.setattr(torch, "zeros", fails)
    model.nets.layers._triton_works.cache_clear()

    with pytest.raises(kind):
        model.nets.layers._triton_works(CPU)
    model.nets.layers._triton_works.cache_clear()
